"""Who owns which block of the KV cache."""

import heapq


class BlockManager:
    """Hands out blocks, lowest number first, and takes them back.

    Blocks are reserved for a sequence's longest course when it is admitted, so a running sequence
    never waits for one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))
        self._owned: dict[int, tuple[int, ...]] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    def blocks_for(self, num_positions: int) -> int:
        """Blocks that hold this many positions."""
        return -(-num_positions // self.block_size)

    def can_reserve(self, num_positions: int) -> bool:
        """Whether so many positions could be reserved now."""
        return self.blocks_for(num_positions) <= self.num_free

    def reserve(self, owner: int, num_positions: int) -> tuple[int, ...]:
        """Give ``owner`` blocks for this many positions."""
        count = self.blocks_for(num_positions)
        assert owner not in self._owned, f"sequence {owner} has blocks already"
        assert count <= self.num_free, f"{count} blocks wanted, {self.num_free} free"
        blocks = tuple(heapq.heappop(self._free) for _ in range(count))
        self._owned[owner] = blocks
        return blocks

    def release(self, owner: int) -> None:
        """Take back all blocks of ``owner``."""
        for block in self._owned.pop(owner):
            heapq.heappush(self._free, block)

    def check(self) -> None:
        """Assert that every block is free or owned, exactly once."""
        owned = [block for blocks in self._owned.values() for block in blocks]
        everything = sorted(owned + self._free)
        assert everything == list(range(self.num_blocks)), "a block is lost or owned twice"
