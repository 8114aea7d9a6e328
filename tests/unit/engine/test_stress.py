"""Ten thousand random operations on a tiny model: whatever happens beside it, a request's tokens
are those it gets alone, and in the end nothing is left."""

import gc
import random
import weakref
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.arrays import tensor_of
from tests.cuda.twin_device import TwinDevice
from tests.engines import run_all, tiny_engine
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.block_manager import BlockManager
from thinslice.engine.engine import Engine
from thinslice.engine.sequence import Sequence, Status
from thinslice.memory.spilled_kv import BlockMove, SpilledKv

NUM_OPERATIONS = 10_000
# Room for about two and a half of the longest sequences, so that blocks run out often.
NUM_KV_BLOCKS = 40


pytestmark = pytest.mark.usefixtures("one_thread")


class HostTwin(TwinDevice):
    """A device whose memory is the host's, where the kernels compute."""

    def bytes_of(self, data: NDArray[np.generic]) -> torch.Tensor:
        return tensor_of(data).view(-1).view(torch.uint8)


class Stress:
    """Requests drawn from a fixed set, so that what each gives alone is known.

    With room for ``num_host_blocks`` beside, as where the blocks lie on a device.
    """

    def __init__(self, seed: int, num_host_blocks: int = 0) -> None:
        self.rng = random.Random(seed)
        self.engine = tiny_engine(num_kv_blocks=NUM_KV_BLOCKS, chunk=24, max_num_seqs=5)
        if num_host_blocks:
            runner = self.engine.runner
            self.engine.scheduler.blocks = BlockManager(
                NUM_KV_BLOCKS, runner.block_size, num_host_blocks=num_host_blocks
            )
            runner.spilled = SpilledKv(HostTwin(), runner.kv_caches, num_host_blocks)
        self.now = 0.0
        self.engine.clock = lambda: self.now
        self.kinds = [self._kind() for _ in range(80)]
        self.alone = [
            [tokens_alone(prompt, params, index) for index in range(params.n)]
            for prompt, params, _ in self.kinds
        ]
        self.scores_alone = [scores_alone(prompt) for prompt, *_ in self.kinds]
        self.alive: dict[Sequence, list[int]] = {}
        # With what each gives alone.
        self.scored: dict[Sequence, list[float]] = {}
        self.ends: Counter[str] = Counter()

    def _kind(self) -> tuple[list[int], SamplingParams, str]:
        """Prompts that begin alike, greedy and drawn, with penalties and without."""
        rng = self.rng
        prefix = [3 + rng.randrange(2)] * rng.choice([0, 7, 12, 30])
        prompt = prefix + [rng.randrange(3, 64) for _ in range(rng.randint(1, 12))]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            seed=rng.randrange(100),
            max_tokens=rng.randint(1, 20),
            n=rng.choice([1, 1, 1, 3]),
        )
        return prompt, params, rng.choice(["", "", "mine"])

    def run(self) -> None:
        operations = [self.add, self.score, self.abort, self.draft, self.step]
        for operation in self.rng.choices(operations, (5, 1, 1, 4, 12), k=NUM_OPERATIONS):
            operation()
            self.engine.scheduler.blocks.check()
        while self.engine.has_work:
            self.step()
            self.engine.scheduler.blocks.check()

    def add(self) -> None:
        if len(self.engine.scheduler.waiting) > 12:
            return
        which = self.rng.randrange(len(self.kinds))
        prompt, params, salt = self.kinds[which]
        deadline_s = 20.0 if self.rng.random() < 0.1 else None
        scheduling = Scheduling(
            priority=self.rng.choice([0, 0, 0, 1]),
            deadline_s=deadline_s,
            cache_salt=salt,
        )
        sequences = self.engine.add_samples(prompt, params, scheduling=scheduling)
        self.alive |= dict(zip(sequences, self.alone[which], strict=True))

    def score(self) -> None:
        which = self.rng.randrange(len(self.kinds))
        prompt = self.kinds[which][0]
        if len(prompt) > 1 and len(self.engine.scheduler.waiting) <= 12:
            start = self.rng.randrange(1, len(prompt))
            expected = self.scores_alone[which][start - 1 :]
            self.scored[self.engine.add_scored(prompt, start)] = expected

    def abort(self) -> None:
        alive = [*self.alive, *self.scored]
        if alive:
            sequence = self.rng.choice(alive)
            self.engine.abort(sequence)
            self._check_ended(sequence)

    def draft(self) -> None:
        """Guess right for a while, then perhaps wrong."""
        for sequence in self.engine.scheduler.running:
            if sequence.scored is not None:
                continue
            done = len(sequence.completion_token_ids)
            right = self.alive[sequence][done : done + self.rng.randint(0, 4)]
            wrong = [self.rng.randrange(64)] * self.rng.randint(0, 2)
            sequence.draft_token_ids = [*right, *wrong]

    def step(self) -> None:
        self.now += 1.0
        for output in self.engine.step():
            if output.finish_reason is not None:
                self._check_ended(output.sequence)

    def _check_ended(self, sequence: Sequence) -> None:
        assert sequence.status is Status.FINISHED
        self.ends[str(sequence.finish_reason)] += 1
        if sequence in self.scored:
            scores = self.scored.pop(sequence)
            assert len(sequence.logprobs) == len(scores) or sequence.finish_reason == "abort"
            scores = scores[: len(sequence.logprobs)]
            assert [one.logprob for one in sequence.logprobs] == pytest.approx(scores, abs=1e-4)
            return
        expected, got = self.alive.pop(sequence), sequence.completion_token_ids
        assert got == expected[: len(got)], f"sequence {sequence.seq_id}"
        if sequence.finish_reason in ("stop", "length"):
            assert len(got) == len(expected)


def tokens_alone(prompt: list[int], params: SamplingParams, index: int) -> list[int]:
    """What one sample of a prompt gives on an engine of its own."""
    assert params.seed is not None
    engine = tiny_engine()
    alone = replace(params, n=1, seed=params.seed + index)
    sequence = engine.add_request(prompt, alone)
    run_all(engine)
    return sequence.completion_token_ids


def scores_alone(token_ids: list[int]) -> list[float]:
    """What each of the tokens but the first is found to be on an engine of its own."""
    if len(token_ids) < 2:
        return []
    return [one.logprob for one in tiny_engine().score(token_ids)]


@pytest.mark.parametrize("num_host_blocks", [0, 25])
def test_ten_thousand_operations_change_no_token_and_leave_nothing(num_host_blocks: int) -> None:
    stress = Stress(seed=1, num_host_blocks=num_host_blocks)
    engine = stress.engine
    moves = count_moves(engine)
    stress.run()
    assert all(moves[is_spill] > 100 for is_spill in (True, False)) or not num_host_blocks
    assert not stress.alive
    assert not stress.scored
    assert set(stress.ends) == {"stop", "length", "scored", "abort", "deadline"}
    metrics = engine.metrics
    # All of it happened, and often.
    assert min(metrics.preemptions, metrics.accepted_tokens, metrics.prefix_hit_tokens) > 100
    assert metrics.drafted_tokens > metrics.accepted_tokens + 300
    assert min(stress.ends.values()) > 20
    assert (metrics.num_waiting, metrics.num_running, metrics.kv_blocks_used) == (0, 0, 0)
    assert engine.scheduler.blocks.num_free == NUM_KV_BLOCKS
    assert_nothing_is_kept(engine)


def count_moves(engine: Engine) -> Counter[bool]:
    """How many blocks go to host memory and come back, from now on."""
    moves: Counter[bool] = Counter()
    move_blocks = engine.runner.move_blocks

    def counted(queue: deque[BlockMove]) -> None:
        moves.update(move.is_spill for move in queue)
        move_blocks(queue)

    engine.runner.move_blocks = counted  # type: ignore[method-assign]
    return moves


def assert_nothing_is_kept(engine: Engine) -> None:
    """A finished sequence is not held on to by the engine."""
    sequence = engine.add_request([5, 6, 7], SamplingParams(max_tokens=3))
    run_all(engine)
    kept = weakref.ref(sequence)
    del sequence
    gc.collect()
    assert kept() is None
    assert not [one for one in gc.get_objects() if type(one) is Sequence]


def test_a_block_written_by_mistake_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations fail where a prefix is taken for one block more than it has."""
    stress = Stress(seed=1)
    blocks = stress.engine.scheduler.blocks
    find_prefix = blocks._find_prefix

    def one_too_many(sequence: Sequence) -> list[bytes]:
        found = find_prefix(sequence)
        held = [one for b in blocks._evictable if (one := blocks._digests[b]) not in found]
        room = len(found) < (sequence.num_tokens - 1) // blocks.block_size
        return [*found, held[0]] if found and held and room else found

    monkeypatch.setattr(blocks, "_find_prefix", one_too_many)
    monkeypatch.setattr(blocks, "check", lambda: None)
    with pytest.raises(AssertionError, match="sequence"):
        stress.run()


def test_a_block_that_does_not_come_back_whole_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations fail where blocks come back from another place in host memory."""
    stress = Stress(seed=1, num_host_blocks=25)
    spilled = stress.engine.runner.spilled
    assert spilled is not None
    move = spilled.move

    def confuse(moves: deque[BlockMove]) -> None:
        confused = [
            one if one.is_spill else replace(one, host_block=(one.host_block + 1) % 25)
            for one in moves
        ]
        moves.clear()
        move(deque(confused))

    monkeypatch.setattr(spilled, "move", confuse)
    with pytest.raises(AssertionError, match="sequence"):
        stress.run()
