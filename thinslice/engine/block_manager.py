"""Who holds which block of the KV cache, and which prefixes are in it.

A block is held by the sequences whose block tables it is in. Full blocks are also cached: found by
the digest of all tokens up to their end, so that a later sequence with the same beginning takes
them as they are. A cached block that nobody holds stays until its room is needed, the one let go
of longest ago first. Only blocks full of computed tokens are ever shared, and those are never
written again, so nothing is copied.

Where the plan has room in host memory beside a device, a cached block whose room is needed there is
spilled to it instead of forgotten, and comes back when its prefix is wanted again: that of a
sequence that was preempted, or of a new one. What must be copied for it is queued in ``moves``.

A prediction layer's K and V lie in the same blocks, and those of a position depend on the token
after it as well, a second such layer's on two, and so on. Where there are any, a block's digest
therefore takes in as many tokens of the next block (``lookahead``): who shares a block shares all
that its rows were made of.

Source: the prefix caching of vLLM (v1/core/block_pool.py) in the manner of nano-vllm.
"""

import hashlib
import heapq
from array import array
from collections import deque
from itertools import takewhile

from thinslice.engine.sequence import Sequence
from thinslice.memory.spilled_kv import BlockMove


def root_digest(salt: str, weights_version: int) -> bytes:
    """The digest of an empty prefix; only sequences of one root share blocks."""
    return _hash(weights_version.to_bytes(8) + salt.encode(errors="surrogatepass"))


def _digest(parent: bytes, token_ids: list[int]) -> bytes:
    return _hash(parent + array("q", token_ids).tobytes())


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


class BlockManager:
    """Hands out a fixed number of blocks, takes them back, and remembers what is in them.

    ``lookahead`` tokens after a block decide with its own what is in it: one for each prediction
    layer that has K and V in it.

    Attributes:
        moves: copies to make, in this order, before anything is computed with the blocks.
        weights_version: of the weights that fill blocks from now on; only they share them.
    """

    def __init__(
        self, num_blocks: int, block_size: int, lookahead: int = 0, num_host_blocks: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.weights_version = 0
        self.block_size = block_size
        self.lookahead = lookahead
        self.moves: deque[BlockMove] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget who holds what and what is cached: every block is free and empty.

        Block tables are not emptied; whoever has one throws it away.
        """
        self._holders: dict[int, Sequence] = {}
        self._ref_counts = [0] * self.num_blocks
        # Empty blocks, lowest number first: memory that was never touched takes none.
        self._free = list(range(self.num_blocks))
        self._cached: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        # Cached blocks that nobody holds, the one let go of longest ago first.
        self._evictable: dict[int, None] = {}
        self._free_host = list(range(self.num_host_blocks))
        # Digests of what is in host memory, spilled longest ago first.
        self._spilled: dict[bytes, int] = {}
        self.moves.clear()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, the cached ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks a prefix is found in, held or not."""
        return len(self._cached)

    @property
    def num_spilled(self) -> int:
        """Blocks in host memory."""
        return len(self._spilled)

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-num_positions // self.block_size)

    def num_taken_by(self, sequence: Sequence) -> int:
        """Free blocks that a waiting sequence would take for all tokens it has so far."""
        cached = [self._cached.get(digest) for digest in self._find_prefix(sequence)]
        held = sum(block is not None and self._ref_counts[block] > 0 for block in cached)
        return self.blocks_for(sequence.num_tokens) - held

    def num_alone(self, sequence: Sequence) -> int:
        """Blocks that would be free if this sequence let go of them."""
        return sum(self._ref_counts[block] == 1 for block in sequence.blocks)

    def take_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that hold its beginning, as far as it is cached.

        The first of its tokens whose logits are wanted is left to compute. What was spilled takes
        free blocks, which ``num_taken_by`` counts.
        """
        assert not sequence.blocks, f"sequence {sequence.seq_id} has blocks already"
        digests = self._find_prefix(sequence)
        # All that is here is held, and all that comes back is taken out, before anything is evicted
        # to make room for it.
        for digest in digests:
            block = self._cached.get(digest)
            if block is not None:
                self._evictable.pop(block, None)
                self._ref_counts[block] += 1
        returning = {one: self._spilled.pop(one) for one in digests if one not in self._cached}
        for digest, host_block in returning.items():
            self._bring_back(digest, host_block)
        self._free_host += returning.values()
        sequence.blocks = [self._cached[digest] for digest in digests]
        sequence.num_computed = len(digests) * self.block_size
        self._holders[sequence.seq_id] = sequence

    def grow(self, sequence: Sequence, num_positions: int) -> bool:
        """Give a sequence blocks up to so many positions; False, and none, if there are not."""
        count = self.blocks_for(num_positions) - len(sequence.blocks)
        if count > self.num_free:
            return False
        for _ in range(count):
            block = self._take()
            self._ref_counts[block] = 1
            sequence.blocks.append(block)
        return True

    def cache_computed(self, sequence: Sequence, num_before: int) -> None:
        """Remember the blocks that were filled since ``num_before`` tokens were settled.

        As many tokens after the last one settled must be known as are looked ahead.
        """
        first, stop = num_before // self.block_size, sequence.num_settled // self.block_size
        if first == stop:
            return
        self._extend_digests(sequence, stop)
        for index in range(first, stop):
            digest, block = sequence.digests[index + 1], sequence.blocks[index]
            # Two that computed the same side by side: the first one's block is kept.
            if digest not in self._cached:
                self._cached[digest] = block
                self._digests[block] = digest

    def release(self, sequence: Sequence) -> None:
        """Take back the blocks of a sequence; what is cached in them is kept for others."""
        del self._holders[sequence.seq_id]
        # The end first: a prefix without its end is of use, an end without its prefix is not.
        for block in reversed(sequence.blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] > 0:
                continue
            if block in self._digests:
                self._evictable[block] = None
            else:
                heapq.heappush(self._free, block)
        sequence.blocks = []

    def check(self) -> None:
        """Assert every invariant. Time: all blocks and all tables."""
        held = [0] * self.num_blocks
        for sequence in self._holders.values():
            self._check_table(sequence)
            for block in sequence.blocks:
                held[block] += 1
        assert held == self._ref_counts, "a block's references are not its holders"
        unheld = sorted([*self._free, *self._evictable])
        expected = [block for block, count in enumerate(held) if count == 0]
        assert unheld == expected, "a block is lost, or free while somebody holds it"
        inverse = {block: digest for digest, block in self._cached.items()}
        assert inverse == self._digests, "a digest leads to another block than its own"
        assert len(inverse) == len(self._cached), "two digests for one block"
        assert not any(block in self._digests for block in self._free), "a free block is cached"
        assert all(block in self._digests for block in self._evictable), "an empty block is kept"
        on_host = sorted([*self._free_host, *self._spilled.values()])
        assert on_host == list(range(self.num_host_blocks)), "a block in host memory is lost"

    def _check_table(self, sequence: Sequence) -> None:
        name, blocks = f"sequence {sequence.seq_id}", sequence.blocks
        assert len(set(blocks)) == len(blocks), f"{name} has a block twice"
        capacity = len(blocks) * self.block_size
        assert sequence.num_computed <= capacity, f"{name} has tokens in no block"
        num_full = sequence.num_computed // self.block_size
        for index, block in enumerate(blocks):
            if index >= num_full:
                assert self._ref_counts[block] == 1, f"{name} writes to a block others hold"
                assert block not in self._digests, f"{name} writes to a cached block"
            elif block in self._digests:
                assert self._digests[block] == sequence.digests[index + 1], f"{name}: other tokens"

    def _find_prefix(self, sequence: Sequence) -> list[bytes]:
        """Digests of the sequence's first blocks, as far as they are cached or spilled."""
        most = min(sequence.num_tokens - self.lookahead, sequence.next_row) // self.block_size
        self._extend_digests(sequence, most)
        digests = sequence.digests[1 : most + 1]
        return [*takewhile(lambda one: one in self._cached or one in self._spilled, digests)]

    def _extend_digests(self, sequence: Sequence, num_blocks: int) -> None:
        digests, size = sequence.digests, self.block_size
        if not digests:
            digests.append(root_digest(sequence.scheduling.cache_salt, self.weights_version))
        for index in range(len(digests) - 1, num_blocks):
            token_ids = sequence.tokens(index * size, (index + 1) * size + self.lookahead)
            digests.append(_digest(digests[-1], token_ids))

    def _take(self) -> int:
        """An empty block, or else the cached one let go of longest ago, emptied."""
        if self._free:
            return heapq.heappop(self._free)
        block = next(iter(self._evictable))
        del self._evictable[block]
        digest = self._digests.pop(block)
        del self._cached[digest]
        if self.num_host_blocks and digest not in self._spilled:
            self._spill(block, digest)
        return block

    def _spill(self, block: int, digest: bytes) -> None:
        """Queue a copy to host memory, in place of what was spilled longest ago if that is full.

        Where all of it is on its way back at this moment, nothing is copied.
        """
        if not self._free_host:
            if not self._spilled:
                return
            self._free_host.append(self._spilled.pop(next(iter(self._spilled))))
        host_block = self._free_host.pop()
        self._spilled[digest] = host_block
        self.moves.append(BlockMove(block, host_block, is_spill=True))

    def _bring_back(self, digest: bytes, host_block: int) -> None:
        """Queue a copy from host memory to a free block."""
        block = self._take()
        self._ref_counts[block] = 1
        self._cached[digest] = block
        self._digests[block] = digest
        self.moves.append(BlockMove(block, host_block, is_spill=False))
