"""The block manager's rules one by one: what is shared, what is kept, what is evicted, and when."""

import pytest

from tests.unit.engine.test_scheduler import BLOCK_SIZE, new_sequence
from thinslice.engine.block_manager import BlockManager
from thinslice.engine.sequence import Sequence
from thinslice.memory.spilled_kv import BlockMove


def filled(blocks: BlockManager, sequence: Sequence) -> Sequence:
    """A sequence whose prompt is computed and cached."""
    blocks.take_prefix(sequence)
    assert blocks.grow(sequence, sequence.num_tokens)
    before, sequence.num_computed = sequence.num_computed, sequence.num_tokens
    sequence.num_held = blocks.lookahead
    blocks.cache_computed(sequence, before)
    blocks.check()
    return sequence


def num_found(blocks: BlockManager, sequence: Sequence) -> int:
    return len(blocks._find_prefix(sequence))


def test_a_block_is_found_by_its_tokens_and_those_looked_ahead() -> None:
    """With two prediction layers a block's K and V depend on two tokens of the next one."""
    prompt = [*range(1, 12)]
    for lookahead in (0, 1, 2):
        blocks = BlockManager(8, BLOCK_SIZE, lookahead)
        filled(blocks, sequence_of(0, prompt))
        assert num_found(blocks, sequence_of(1, prompt)) == 2
        for place in range(len(prompt)):
            other = [*prompt]
            other[place] = 99
            # Blocks whose own tokens and those looked ahead are all before the changed one.
            unchanged = sum(end + lookahead <= place for end in (4, 8))
            assert num_found(blocks, sequence_of(2, other)) == unchanged, (lookahead, place)


def sequence_of(seq_id: int, prompt: list[int]) -> Sequence:
    sequence = new_sequence(seq_id, len(prompt), 4)
    sequence.prompt_token_ids = prompt
    return sequence


def test_the_tokens_looked_ahead_are_left_to_compute() -> None:
    """The first token to compute lies as far before the end as the prediction layers look."""
    for lookahead, expected in ((0, 1), (1, 1), (4, 1), (5, 0)):
        blocks = BlockManager(8, BLOCK_SIZE, lookahead)
        filled(blocks, new_sequence(0, 16, 1))
        assert num_found(blocks, new_sequence(1, 8, 1)) == expected


def test_one_token_is_left_to_compute_where_the_whole_prompt_was_computed_before() -> None:
    """A sequence that begins again knows the digest of its last block already."""
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = filled(blocks, new_sequence(0, 8, 1))
    blocks.release(sequence)
    sequence.num_computed = 0
    assert blocks.num_cached == 2
    assert num_found(blocks, sequence) == 1


def test_the_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    blocks.release(filled(blocks, new_sequence(0, 12, 1)))
    filled(blocks, new_sequence(1, 4, 1, first_token=50))
    assert num_found(blocks, new_sequence(2, 13, 1)) == 2


def test_of_two_prefixes_the_one_let_go_of_first_is_evicted_first() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    first, second = (filled(blocks, new_sequence(i, 8, 1, first_token=i)) for i in (10, 20))
    blocks.release(second)
    blocks.release(first)
    filled(blocks, new_sequence(3, 8, 1, first_token=50))
    assert num_found(blocks, new_sequence(4, 9, 1, first_token=10)) == 2
    assert num_found(blocks, new_sequence(5, 9, 1, first_token=20)) == 0


def test_a_prefix_taken_again_is_let_go_of_anew() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    for first_token in (10, 20, 10):
        blocks.release(filled(blocks, new_sequence(first_token, 8, 1, first_token=first_token)))
    filled(blocks, new_sequence(3, 8, 1, first_token=50))
    assert num_found(blocks, new_sequence(4, 9, 1, first_token=10)) == 2


def test_empty_blocks_are_taken_lowest_first_and_before_cached_ones() -> None:
    blocks = BlockManager(5, BLOCK_SIZE)
    cached = filled(blocks, new_sequence(0, 4, 1))
    empty = filled(blocks, new_sequence(1, 3, 1, first_token=9))
    assert (cached.blocks, empty.blocks) == ([0], [1])
    blocks.release(cached)
    blocks.release(empty)
    taken = filled(blocks, new_sequence(2, 16, 1, first_token=7))
    assert taken.blocks == [1, 2, 3, 4]
    assert num_found(blocks, new_sequence(3, 5, 1)) == 1


def test_growing_takes_all_or_none() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    sequence = new_sequence(0, 12, 1)
    blocks.take_prefix(sequence)
    assert not blocks.grow(sequence, 13)
    assert sequence.blocks == []
    assert blocks.grow(sequence, 12)
    assert (len(sequence.blocks), blocks.num_free) == (3, 0)
    assert blocks.grow(sequence, 12), "nothing more is needed"


def test_what_is_held_is_not_taken_twice_and_what_is_let_go_of_counts_as_free() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    first = filled(blocks, new_sequence(0, 9, 1))
    assert (blocks.num_free, blocks.num_cached, blocks.num_alone(first)) == (1, 2, 3)
    same = new_sequence(1, 9, 1)
    assert blocks.num_taken_by(same) == 1
    blocks.take_prefix(same)
    assert (blocks.num_alone(first), blocks.num_alone(same)) == (1, 0)
    blocks.release(same)
    blocks.release(first)
    assert blocks.num_free == 4
    assert blocks.num_taken_by(new_sequence(2, 9, 1)) == 3, "free blocks, cached or not"


def test_only_what_is_settled_is_cached() -> None:
    """Positions whose K and V of a prediction layer are still to come may not be shared."""
    blocks = BlockManager(4, BLOCK_SIZE, lookahead=1)
    sequence = new_sequence(0, 9, 1)
    blocks.take_prefix(sequence)
    assert blocks.grow(sequence, 9)
    sequence.num_computed, sequence.num_held = 8, 1
    blocks.cache_computed(sequence, 0)
    assert blocks.num_cached == 1
    sequence.num_computed, sequence.num_held = 9, 1
    blocks.cache_computed(sequence, 7)
    assert blocks.num_cached == 2


def spilling_manager() -> BlockManager:
    return BlockManager(2, BLOCK_SIZE, num_host_blocks=2)


def test_what_is_evicted_is_spilled_once_and_comes_back() -> None:
    blocks = spilling_manager()
    blocks.release(filled(blocks, new_sequence(0, 8, 1, first_token=10)))
    blocks.release(filled(blocks, new_sequence(1, 8, 1, first_token=20)))
    assert [move.is_spill for move in blocks.moves] == [True, True]
    assert blocks.num_spilled == 2
    blocks.moves.clear()
    back = new_sequence(2, 8, 1, first_token=10)
    assert num_found(blocks, back) == 1, "one token is left to compute"
    blocks.take_prefix(back)
    assert back.num_computed == BLOCK_SIZE
    # It comes back into the room of the prefix let go of longest ago, the end of which goes first.
    assert [move.is_spill for move in blocks.moves] == [True, False]
    spill, fetch = blocks.moves
    assert spill.block == fetch.block == back.blocks[0]
    blocks.check()


def test_host_memory_that_is_full_forgets_what_was_spilled_longest_ago() -> None:
    blocks = spilling_manager()
    for seq_id, first_token in enumerate((10, 20, 30)):
        blocks.release(filled(blocks, new_sequence(seq_id, 8, 1, first_token=first_token)))
    found = {
        first: num_found(blocks, new_sequence(9, 9, 1, first_token=first)) for first in (10, 20, 30)
    }
    assert found == {10: 0, 20: 2, 30: 2}
    blocks.check()


def test_a_block_that_is_spilled_already_is_not_copied_again() -> None:
    """A prompt that ends with a block computes it anew, for one token is left to compute."""
    blocks = BlockManager(1, BLOCK_SIZE, num_host_blocks=2)
    for first_token in (10, 20, 10, 30):
        blocks.release(filled(blocks, new_sequence(first_token, 4, 1, first_token=first_token)))
    assert [move.host_block for move in blocks.moves if move.is_spill] == [1, 0]
    assert blocks.num_spilled == 2


@pytest.mark.parametrize("num_host_blocks", [0, 1])
def test_moves_are_queued_only_where_there_is_room_for_them(num_host_blocks: int) -> None:
    blocks = BlockManager(1, BLOCK_SIZE, num_host_blocks=num_host_blocks)
    for first_token in (10, 20):
        blocks.release(filled(blocks, new_sequence(first_token, 4, 1, first_token=first_token)))
    assert list(blocks.moves) == [BlockMove(0, 0, is_spill=True)] * num_host_blocks


def test_nothing_waits_to_be_moved_after_a_reset() -> None:
    blocks = BlockManager(1, BLOCK_SIZE, num_host_blocks=1)
    for first_token in (10, 20):
        blocks.release(filled(blocks, new_sequence(first_token, 4, 1, first_token=first_token)))
    assert blocks.moves
    blocks.reset()
    assert not blocks.moves


def test_a_block_has_its_digest_once_all_tokens_looked_ahead_are_there() -> None:
    """One that was made of fewer would tell the block from its own."""
    blocks = BlockManager(8, BLOCK_SIZE, 2)
    first, second = sequence_of(0, [*range(1, 6)]), sequence_of(1, [*range(1, 12)])
    assert num_found(blocks, first) == 0
    first.completion_token_ids += [6, 7, 8, 9, 10]
    filled(blocks, first)
    assert num_found(blocks, second) == 2


def test_writing_where_others_read_is_found() -> None:
    """Of the blocks of a sequence, those that are not full yet are its own."""
    blocks = BlockManager(8, BLOCK_SIZE)
    sequence = filled(blocks, new_sequence(0, 2 * BLOCK_SIZE, 8))
    sequence.num_computed = BLOCK_SIZE
    with pytest.raises(AssertionError, match="writes to a cached block"):
        blocks.check()
    sequence.num_computed = 2 * BLOCK_SIZE
    other = new_sequence(1, 2 * BLOCK_SIZE + 1, 8)
    blocks.take_prefix(other)
    blocks.check()
    other.num_computed = BLOCK_SIZE
    with pytest.raises(AssertionError, match="writes to a block others hold"):
        blocks.check()
