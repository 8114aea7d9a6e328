"""Scheduler and block manager: invariants under random operations, and each rule by itself."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.block_manager import BlockManager, root_digest
from thinslice.engine.draws import Draws
from thinslice.engine.scheduler import ScheduledTokens, Scheduler
from thinslice.engine.sequence import Sequence, Status
from thinslice.plan.memory_plan import MemoryPlan, Pool

BLOCK_SIZE, CHUNK, MAX_NUM_SEQS = 4, 10, 4


def small_plan(num_kv_blocks: int = 12) -> MemoryPlan:
    return MemoryPlan(
        pools=(Pool("--memory", 1),),
        dtype="float32",
        kv_dtype="float32",
        context=64,
        chunk=CHUNK,
        max_num_seqs=MAX_NUM_SEQS,
        block_size=BLOCK_SIZE,
        num_kv_blocks=num_kv_blocks,
    )


def new_sequence(
    seq_id: int,
    num_prompt: int,
    num_completion: int,
    first_token: int = 0,
    **scheduling: object,
) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=[first_token, *range(1, num_prompt)],
        params=SamplingParams(),
        scheduling=Scheduling(**scheduling),  # type: ignore[arg-type]
        max_positions=num_prompt + num_completion,
        draws=Draws(0),
    )


def run_step(
    scheduler: Scheduler, num_accepted: Callable[[int], int] = lambda drafts: 0
) -> list[ScheduledTokens]:
    """One step as the engine takes it, every token 0."""
    scheduled = scheduler.schedule()
    scheduler.blocks.check()
    assert sum(tokens.count for tokens in scheduled) <= CHUNK
    assert len(scheduler.running) <= MAX_NUM_SEQS
    assert len({tokens.sequence.seq_id for tokens in scheduled}) == len(scheduled)
    for tokens in scheduled:
        sequence, before = tokens.sequence, tokens.sequence.num_computed
        assert sequence.status is Status.RUNNING
        assert 0 < tokens.count - tokens.num_drafts <= sequence.num_uncomputed
        assert len(sequence.blocks) * BLOCK_SIZE >= before + tokens.count
        sequence.num_computed += tokens.count
        if tokens.num_rows:
            assert tokens.num_rows == tokens.num_drafts + 1
            new = num_accepted(tokens.num_drafts) + 1
            sequence.draft_token_ids.clear()
            sequence.completion_token_ids += [0] * new
            assert sequence.num_tokens <= sequence.max_positions
            sequence.num_computed = sequence.num_tokens - 1
        scheduler.blocks.cache_computed(sequence, before)
        if sequence.num_tokens == sequence.max_positions:
            scheduler.remove(sequence)
    scheduler.blocks.check()
    return scheduled


def shape_of(scheduled: list[ScheduledTokens]) -> list[tuple[int, int]]:
    return [(tokens.sequence.seq_id, tokens.count) for tokens in scheduled]


@given(st.randoms(use_true_random=False))
def test_random_operations_keep_the_invariants(rng: random.Random) -> None:
    scheduler = Scheduler(small_plan())
    alive: list[Sequence] = []
    for seq_id in range(60):
        if rng.random() < 0.5:
            first, priority = rng.randint(0, 1), rng.choice([0, 0, 1])
            size = rng.randint(1, 30), rng.randint(1, 18)
            alive.append(new_sequence(seq_id, *size, first_token=first, priority=priority))
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.1:
            scheduler.remove(alive.pop(rng.randrange(len(alive))))
        for sequence in scheduler.running:
            sequence.draft_token_ids = [0] * rng.choice([0, 0, 3])
        run_step(scheduler, lambda drafts: rng.randint(0, drafts))
        alive = [sequence for sequence in alive if sequence.status is not Status.FINISHED]
    while scheduler.has_work:
        assert run_step(scheduler), "work is left and nothing is scheduled"
    assert scheduler.blocks.num_free == 12


def test_generated_tokens_go_before_prompt_chunks() -> None:
    scheduler = Scheduler(small_plan())
    scheduler.add(new_sequence(0, 3, 9, first_token=7))
    scheduler.add(new_sequence(1, 30, 4))
    assert shape_of(run_step(scheduler)) == [(0, 3), (1, 7)]
    assert shape_of(run_step(scheduler)) == [(0, 1), (1, 9)]


def test_blocks_are_given_as_they_are_needed() -> None:
    scheduler = Scheduler(small_plan())
    sequence = new_sequence(0, 3, 40)
    scheduler.add(sequence)
    counts = []
    for _ in range(7):
        run_step(scheduler)
        counts.append(len(sequence.blocks))
    assert counts == [1, 1, 2, 2, 2, 2, 3]


def test_a_prompt_waits_until_it_fits_beside_what_the_running_ones_need() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=5))
    scheduler.add(new_sequence(0, 12, 2, first_token=5))
    scheduler.add(new_sequence(1, 8, 1, first_token=6))
    assert shape_of(run_step(scheduler)) == [(0, 10)]
    assert shape_of(run_step(scheduler)) == [(0, 2)]
    assert [s.seq_id for s in scheduler.waiting] == [1]
    run_step(scheduler)
    assert shape_of(run_step(scheduler)) == [(1, 8)]


@pytest.mark.parametrize(("num_prompt", "is_admitted"), [(8, True), (9, False)])
def test_a_running_sequence_has_one_block_more_kept_for_it(
    num_prompt: int, is_admitted: bool
) -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=4))
    scheduler.add(new_sequence(0, 3, 12, first_token=5))
    run_step(scheduler)
    scheduler.add(new_sequence(1, num_prompt, 1))
    assert len(scheduler.schedule()) == 1 + is_admitted


def test_a_prompt_that_takes_exactly_all_free_blocks_is_admitted() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=4))
    scheduler.add(new_sequence(0, 4, 1, first_token=5))
    scheduler.add(new_sequence(1, 6, 2, first_token=6))
    assert shape_of(run_step(scheduler)) == [(0, 4), (1, 6)]


def test_no_more_run_than_a_step_has_room_for() -> None:
    """Each running sequence must get its next token in every step."""
    scheduler = Scheduler(replace(small_plan(), chunk=2))
    for seq_id in range(3):
        scheduler.add(new_sequence(seq_id, 1, 6, first_token=seq_id))
    assert shape_of(run_step(scheduler)) == [(0, 1), (1, 1)]
    assert shape_of(run_step(scheduler)) == [(0, 1), (1, 1)]
    assert [s.seq_id for s in scheduler.waiting] == [2]


def test_a_sequence_that_is_preempted_begins_anew_without_drafts_or_held_positions() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=3))
    first, last = new_sequence(0, 3, 5, first_token=5), new_sequence(1, 3, 5, first_token=6)
    for sequence in (first, last):
        scheduler.add(sequence)
    run_step(scheduler)
    run_step(scheduler)
    last.draft_token_ids, last.num_held = [1, 2], 1
    step = scheduler.schedule()
    assert [tokens.sequence for tokens in step] == [first]
    assert (last.status, last.num_preemptions) == (Status.WAITING, 1)
    assert (last.num_computed, last.num_held, last.draft_token_ids) == (0, 0, [])
    assert (last.blocks, scheduler.num_preemptions) == ([], 1)


def test_as_many_run_as_their_longest_courses_fit() -> None:
    """Room that no running sequence can come to need is given away."""
    scheduler = Scheduler(small_plan(num_kv_blocks=6))
    for seq_id in range(3):
        scheduler.add(new_sequence(seq_id, 3, 5, first_token=seq_id))
    assert len(run_step(scheduler)) == 3
    while scheduler.has_work:
        run_step(scheduler)
    assert scheduler.num_preemptions == 0


def test_the_last_to_come_gives_way_and_goes_on_later() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=6))
    first, last = new_sequence(0, 4, 16, first_token=5), new_sequence(1, 4, 16, first_token=6)
    scheduler.add(first)
    scheduler.add(last)
    while first.status is not Status.FINISHED:
        run_step(scheduler)
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)
    so_far = len(last.completion_token_ids)
    assert so_far > 4
    run_step(scheduler)
    assert last.status is Status.RUNNING
    assert last.num_computed >= so_far + 4 - BLOCK_SIZE, "the prefix cache had most of it"
    while scheduler.has_work:
        run_step(scheduler)
    assert len(last.completion_token_ids) == 16


def test_lower_priority_values_go_first_and_displace_others() -> None:
    scheduler = Scheduler(small_plan())
    for seq_id in range(4):
        scheduler.add(new_sequence(seq_id, 2, 20, first_token=seq_id, priority=5))
    run_step(scheduler)
    scheduler.add(new_sequence(4, 2, 20, first_token=4, priority=5))
    scheduler.add(new_sequence(5, 2, 20, first_token=5, priority=-1))
    run_step(scheduler)
    assert sorted(s.seq_id for s in scheduler.running) == [0, 1, 2, 5]
    assert [s.seq_id for s in scheduler.waiting] == [3, 4]


@pytest.mark.parametrize(("num_prompt", "helps"), [(12, True), (13, False)])
def test_others_are_displaced_where_that_makes_room_and_only_there(
    num_prompt: int, helps: bool
) -> None:
    """Of one's own priority nobody is, and they keep what they soon need."""
    scheduler = Scheduler(small_plan(num_kv_blocks=6))
    equal = new_sequence(0, 4, 12, first_token=5)
    victim = new_sequence(1, 3, 9, first_token=6, priority=5)
    for sequence in (equal, victim):
        scheduler.add(sequence)
    run_step(scheduler)
    wanted = new_sequence(2, num_prompt, 1)
    scheduler.add(wanted)
    scheduler.schedule()
    assert wanted.status is (Status.RUNNING if helps else Status.WAITING)
    assert victim.status is (Status.WAITING if helps else Status.RUNNING)
    assert equal.status is Status.RUNNING


def test_blocks_shared_with_who_is_displaced_are_no_room() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=5))
    equal = new_sequence(0, 4, 12, first_token=5)
    victim = new_sequence(1, 8, 9, priority=5)
    for sequence in (equal, victim):
        scheduler.add(sequence)
    run_step(scheduler)
    run_step(scheduler)
    wanted = new_sequence(2, 16, 1)
    assert scheduler.blocks.num_taken_by(wanted) == 2
    scheduler.add(wanted)
    scheduler.schedule()
    assert (wanted.status, wanted.num_preemptions) == (Status.WAITING, 0)
    scheduler.blocks.check()


def test_a_cached_prefix_is_taken_as_it_is() -> None:
    scheduler = Scheduler(small_plan())
    for seq_id in range(2):
        sequence = new_sequence(seq_id, 9, 1)
        scheduler.add(sequence)
        run_step(scheduler)
    assert (sequence.num_cached, scheduler.num_prefix_hits) == (8, 8)
    assert not scheduler.has_work


def test_at_least_one_token_is_computed() -> None:
    scheduler = Scheduler(small_plan())
    for seq_id in range(2):
        scheduler.add(new_sequence(seq_id, 8, 1))
        scheduled = run_step(scheduler)
    assert shape_of(scheduled) == [(1, 4)]


def test_another_salt_or_another_first_token_shares_nothing() -> None:
    scheduler = Scheduler(small_plan())
    for seq_id, (first, salt) in enumerate([(0, ""), (1, ""), (0, "a"), (0, "b")]):
        sequence = new_sequence(seq_id, 9, 1, first_token=first, cache_salt=salt)
        scheduler.add(sequence)
        run_step(scheduler)
        assert sequence.num_cached == 0
    assert len({root_digest("a", 0), root_digest("a", 1), root_digest("b", 0)}) == 3


def test_the_block_let_go_of_longest_ago_is_emptied_first() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=4))
    for seq_id, first in enumerate([10, 20, 10, 30]):
        scheduler.add(new_sequence(seq_id, 5, 1, first_token=first))
        run_step(scheduler)
    # Three prefixes are cached; a prompt of two blocks takes the free one and the oldest.
    scheduler.add(new_sequence(4, 8, 1, first_token=40))
    run_step(scheduler)
    for seq_id, first in enumerate([20, 10, 30], start=5):
        scheduler.add(new_sequence(seq_id, 5, 1, first_token=first))
    assert [len(scheduler.blocks._find_prefix(s)) for s in scheduler.waiting] == [0, 1, 1]


def test_samples_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    scheduler = Scheduler(small_plan())
    sequences = [new_sequence(seq_id, 11, 3) for seq_id in range(3)]
    for sequence in sequences:
        sequence.leader = None if sequence is sequences[0] else sequences[0]
        scheduler.add(sequence)
    assert shape_of(run_step(scheduler)) == [(0, 10)]
    assert shape_of(run_step(scheduler)) == [(0, 1)]
    assert shape_of(run_step(scheduler)) == [(0, 1), (1, 3), (2, 3)]
    assert sequences[0].blocks[:2] == sequences[1].blocks[:2] == sequences[2].blocks[:2]
    assert len({sequence.blocks[2] for sequence in sequences}) == 3


def test_drafts_run_where_there_is_room_and_take_nobodys_blocks() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=4))
    first, second = new_sequence(0, 4, 5, first_token=5), new_sequence(1, 4, 5, first_token=6)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    first.draft_token_ids, second.draft_token_ids = [0] * 9, [0] * 9
    scheduled = scheduler.schedule()
    # Three of nine: one token more must end at the longest completion. Both have their last block.
    assert [(t.count, t.num_drafts, t.num_rows) for t in scheduled] == [(4, 3, 4), (4, 3, 4)]
    assert (first.num_preemptions, second.num_preemptions) == (0, 0)


@pytest.mark.parametrize(
    ("num_sequences", "expected"), [(1, [(10, 9)]), (3, [(8, 7), (1, 0), (1, 0)])]
)
def test_drafts_leave_room_for_the_tokens_of_those_that_come_after(
    num_sequences: int, expected: list[tuple[int, int]]
) -> None:
    scheduler = Scheduler(small_plan())
    sequences = [new_sequence(seq_id, 3, 20, first_token=seq_id) for seq_id in range(num_sequences)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    for sequence in sequences:
        sequence.draft_token_ids = [0] * 9
    assert [(t.count, t.num_drafts) for t in scheduler.schedule()] == expected


def test_the_last_in_order_has_all_the_room_that_is_left_for_its_drafts() -> None:
    scheduler = Scheduler(small_plan())
    sequences = [new_sequence(seq_id, 3, 20, first_token=seq_id) for seq_id in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    sequences[1].draft_token_ids = [0] * 9
    assert [(t.count, t.num_drafts) for t in scheduler.schedule()] == [(1, 0), (9, 8)]
    assert len(sequences[1].draft_token_ids) == 8, "those that do not run are let go"


def test_the_room_in_a_step_of_what_is_displaced_goes_to_who_displaces_it() -> None:
    scheduler = Scheduler(small_plan())
    sequences = [new_sequence(seq_id, 2, 20, first_token=seq_id, priority=5) for seq_id in range(4)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_step(scheduler)
    sequences[3].draft_token_ids = [0] * 5
    scheduler.add(new_sequence(4, 9, 4, first_token=4, priority=-1))
    assert shape_of(scheduler.schedule()) == [(0, 1), (1, 1), (2, 1), (4, 7)]
    assert sequences[3].status is Status.WAITING


def test_lost_blocks_and_false_references_are_seen() -> None:
    def manager() -> tuple[BlockManager, Sequence]:
        blocks, sequence = BlockManager(6, BLOCK_SIZE), new_sequence(0, 10, 1)
        blocks.take_prefix(sequence)
        assert blocks.grow(sequence, 10)
        sequence.num_computed = 10
        blocks.cache_computed(sequence, 0)
        blocks.check()
        return blocks, sequence

    def shared_end(blocks: BlockManager, sequence: Sequence) -> None:
        other = new_sequence(1, 3, 1)
        blocks.take_prefix(other)
        other.blocks.append(sequence.blocks[2])
        blocks._ref_counts[sequence.blocks[2]] += 1

    faults: list[Callable[[BlockManager, Sequence], object]] = [
        lambda blocks, _: blocks._free.pop(),
        lambda blocks, sequence: blocks._free.append(sequence.blocks[0]),
        lambda blocks, sequence: sequence.blocks.pop(),
        lambda blocks, sequence: sequence.blocks.append(sequence.blocks[0]),
        lambda blocks, _: blocks._digests.popitem(),
        lambda blocks, sequence: sequence.digests.reverse(),
        shared_end,
    ]
    for fault in faults:
        blocks, sequence = manager()
        fault(blocks, sequence)
        with pytest.raises(AssertionError):
            blocks.check()


def test_tokens_across_prompt_completion_and_drafts() -> None:
    sequence = new_sequence(0, 3, 5)
    sequence.completion_token_ids = [10, 11]
    for drafts in ([], [20, 21, 22]):
        sequence.draft_token_ids = drafts
        everything = [0, 1, 2, 10, 11, *drafts]
        for start in range(len(everything) + 1):
            for stop in range(start, len(everything) + 1):
                assert sequence.tokens(start, stop) == everything[start:stop]


def test_a_scheduler_that_begins_again_has_all_waiting_in_order_and_nothing_in_blocks() -> None:
    scheduler = Scheduler(small_plan())
    sequences = [new_sequence(seq_id, 6, 4, first_token=seq_id) for seq_id in range(3)]
    for sequence in reversed(sequences):
        scheduler.add(sequence)
    run_step(scheduler)
    run_step(scheduler)
    sequences[0].num_held, sequences[0].draft_token_ids = 2, [1, 2]
    running = [sequence for sequence in sequences if sequence.status is Status.RUNNING]
    assert running
    scheduler.restart(sequences)
    scheduler.blocks.check()
    assert (scheduler.waiting, scheduler.running) == (sequences[::-1], [])  # as they came
    assert scheduler.blocks.num_free == 12
    assert (scheduler.blocks.num_cached, len(scheduler.blocks.moves)) == (0, 0)
    for sequence in sequences:
        assert sequence.status is Status.WAITING
        assert (sequence.num_computed, sequence.num_held, sequence.blocks) == (0, 0, [])
        assert sequence.draft_token_ids == []
        assert sequence.num_preemptions == (sequence in running)
    assert scheduler.num_preemptions == len(running)
    while scheduler.has_work:
        run_step(scheduler)
