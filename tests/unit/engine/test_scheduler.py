"""Scheduler and block manager: invariants under random operations."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinslice.config import SamplingParams
from thinslice.engine.block_manager import BlockManager
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Sequence, Status
from thinslice.plan.memory_plan import MemoryPlan


def small_plan(num_kv_blocks: int = 12) -> MemoryPlan:
    return MemoryPlan(
        budget_bytes=1,
        dtype="float32",
        kv_dtype="float32",
        context=64,
        chunk=10,
        max_num_seqs=4,
        block_size=4,
        num_kv_blocks=num_kv_blocks,
        parts=(),
    )


def new_sequence(seq_id: int, num_prompt: int, num_completion: int) -> Sequence:
    return Sequence(
        seq_id=seq_id,
        prompt_token_ids=list(range(num_prompt)),
        params=SamplingParams(),
        max_positions=num_prompt + num_completion,
        generator=torch.Generator(),
    )


@given(st.randoms(use_true_random=False))
def test_random_operations_keep_the_invariants(rng: random.Random) -> None:
    scheduler = Scheduler(small_plan())
    alive: list[Sequence] = []
    for seq_id in range(60):
        if rng.random() < 0.5:
            alive.append(new_sequence(seq_id, rng.randint(1, 30), rng.randint(1, 18)))
            scheduler.add(alive[-1])
        if alive and rng.random() < 0.1:
            scheduler.finish(alive.pop(rng.randrange(len(alive))), "abort")
        run_step(scheduler)
        alive = [sequence for sequence in alive if sequence.status is not Status.FINISHED]
    while scheduler.has_work:
        assert run_step(scheduler) > 0, "work is left and nothing is scheduled"
    assert scheduler.blocks.num_free == 12


def run_step(scheduler: Scheduler) -> int:
    """One step as the engine takes it; the number of tokens it ran."""
    scheduled = scheduler.schedule()
    total = sum(tokens.count for tokens in scheduled)
    assert total <= 10
    assert len(scheduler.running) <= 4
    scheduler.blocks.check()
    for tokens in scheduled:
        sequence, is_sampled = tokens.sequence, tokens.is_sampled
        assert tokens.count <= sequence.num_uncomputed
        sequence.num_computed += tokens.count
        assert sequence.num_computed <= len(sequence.blocks) * 4
        if is_sampled:
            sequence.completion_token_ids.append(0)
            if sequence.num_tokens >= sequence.max_positions:
                scheduler.finish(sequence, "length")
    return total


def test_generated_tokens_go_before_prompt_chunks() -> None:
    scheduler = Scheduler(small_plan())
    long, short = new_sequence(0, 20, 4), new_sequence(1, 3, 4)
    scheduler.add(long)
    scheduler.add(short)
    first = scheduler.schedule()
    assert [(t.sequence.seq_id, t.count) for t in first] == [(0, 10)]
    short.num_computed, short.completion_token_ids = 3, [7]
    long.num_computed = 10
    second = scheduler.schedule()
    assert [(t.sequence.seq_id, t.count) for t in second] == [(1, 1), (0, 9)]


def test_a_sequence_waits_until_its_longest_course_fits() -> None:
    scheduler = Scheduler(small_plan(num_kv_blocks=5))
    scheduler.add(new_sequence(0, 8, 8))
    scheduler.add(new_sequence(1, 4, 4))
    scheduler.schedule()
    assert [s.seq_id for s in scheduler.running] == [0]
    scheduler.finish(scheduler.running[0], "abort")
    scheduler.schedule()
    assert [s.seq_id for s in scheduler.running] == [1]


def test_a_lost_block_and_one_owned_twice_are_seen() -> None:
    lost = BlockManager(4, 16)
    lost._free.pop()
    twice = BlockManager(4, 16)
    blocks = twice.reserve(0, 20)
    twice._owned[1] = blocks[:1]
    for manager in (lost, twice):
        with pytest.raises(AssertionError):
            manager.check()


def test_tokens_across_prompt_and_completion() -> None:
    sequence = new_sequence(0, 3, 5)
    sequence.completion_token_ids = [10, 11]
    everything = [0, 1, 2, 10, 11]
    for start in range(6):
        for stop in range(start, 6):
            assert sequence.tokens(start, stop) == everything[start:stop]
