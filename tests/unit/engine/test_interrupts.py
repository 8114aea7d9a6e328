"""An interrupt at any line of the engine: nobody's tokens change, and no block is lost.

Raised by a trace function at the k-th line that runs in the engine's files, for k drawn from a
printed seed; ``pytest --long`` takes every line that runs, the first time, the last time and once
between: a course passes 41,000 lines, of which 760 differ.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any
from weakref import finalize

import pytest

from tests.engines import run_all, tiny_engine
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.drafting import Drafting
from thinslice.engine.engine import Engine
from thinslice.engine.operation import Undo
from thinslice.engine.scheduler import Scheduler
from thinslice.engine.sequence import Sequence, Status
from thinslice.errors import BusyError
from thinslice.plan.memory_plan import DraftPlan

pytestmark = pytest.mark.usefixtures("one_thread", "always_drafting")
NUM_SAMPLED = 50
MOST_STEPS = 500
PLACE = "/thinslice/engine/"
DRAWN = SamplingParams(temperature=1.2, top_p=0.95, seed=5, max_tokens=10, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PREFIX = [3, 9, 27, 3, 9, 27, 3, 9]
# Some begin alike, some are drawn; together they need more blocks than there are.
KINDS = (
    (PREFIX, GREEDY),
    ([*PREFIX, 5], DRAWN),
    ([7, 8] * 9, replace(GREEDY, frequency_penalty=0.3)),
    ([*PREFIX, 5, 6], replace(DRAWN, seed=9, n=2)),
    ([4, 4, 4, 4, 4, 4], replace(DRAWN, seed=2)),
)
SCORED = [*PREFIX, *range(5, 25)]
Trace = Callable[[FrameType, str, Any], Any]


@pytest.fixture
def always_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(self: DraftLength, num_drafting: int, num_other_rows: int = 0) -> int:
        return self.max_length if num_drafting else 0

    monkeypatch.setattr(DraftLength, "choose", choose)


def small_engine() -> Engine:
    engine = tiny_engine(num_kv_blocks=15, chunk=12, max_num_seqs=4)
    engine.drafting = Drafting(DraftPlan(uses_ngram=True, num_mtp_layers=0, length=3), None)
    return engine


@dataclass
class Interruption:
    """Raises an error at the ``at``-th line; counts lines where there is none.

    Attributes:
        within: the function whose lines are counted; None for all.
        lines: that have run, in their order.
    """

    at: int | None = None
    error: type[BaseException] = KeyboardInterrupt
    within: str | None = None
    lines: list[str] = field(default_factory=list)
    is_over: bool = False

    @property
    def place(self) -> str:
        return self.lines[-1]

    def __call__(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        if self.is_over or PLACE not in frame.f_code.co_filename or lets_go(frame):
            return None
        return self._line

    def _line(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        if event != "line" or self.is_over:
            return self._line
        if self.within not in (None, frame.f_code.co_name):
            return self._line
        self.lines.append(f"{frame.f_code.co_filename.split(PLACE)[1]}:{frame.f_lineno}")
        if len(self.lines) == self.at:
            self.is_over = True
            self.act()
        return self._line

    def act(self) -> None:
        raise self.error


def lets_go(frame: FrameType | None) -> bool:
    """Whether an object is being let go: what is raised then is printed by Python, no further."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code is finalize.__call__.__code__:
            return True
        frame = frame.f_back
    return False


@dataclass
class Course:
    """Requests that come, go on and are aborted, the same each time, with one interruption."""

    interruption: Interruption
    engine: Engine = field(default_factory=small_engine)
    # With what each writes alone.
    sequences: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    scored: Sequence | None = None

    def run(self, alone: list[list[list[int]]]) -> None:
        for index in range(len(KINDS)):
            self._traced(lambda index=index: self._add(index, alone))
            if index == 1:
                self._traced(self._add_scored)
            self._traced(self.engine.step)
            self._traced(self.engine.step)
        self._traced(self._abort)
        num_steps = 0
        while self.engine.has_work:
            self._traced(self.engine.step)
            self.engine.scheduler.blocks.check()
            num_steps += 1
            assert num_steps < MOST_STEPS, "sequences that never end"
        self._check()

    def _add(self, index: int, alone: list[list[list[int]]]) -> None:
        # The last goes first.
        scheduling = Scheduling(priority=-(index == len(KINDS) - 1))
        sequences = self.engine.add_samples(*KINDS[index], scheduling=scheduling)
        self.sequences += zip(sequences, alone[index], strict=True)

    def _add_scored(self) -> None:
        self.scored = self.engine.add_scored(SCORED, 3)

    def _abort(self) -> None:
        if self.sequences:
            self.ended.append(self.sequences[0][0])
            self.engine.abort(self.sequences[0][0])

    def _traced(self, operation: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self.interruption)
        try:
            operation()
        except (KeyboardInterrupt, MemoryError):
            assert self.interruption.is_over
        finally:
            sys.settrace(before)

    def _check(self) -> None:
        blocks = self.engine.scheduler.blocks
        blocks.check()
        assert blocks.num_free == blocks.num_blocks
        if self.scored is not None and self.scored.error is None:
            assert self.scored.finish_reason == "scored"
            assert len(self.scored.logprobs) == len(SCORED) - 3, self.interruption.place
        for sequence, expected in self.sequences:
            assert sequence.status is Status.FINISHED
            got = sequence.completion_token_ids
            # Memory that runs out while a row is sampled is that sequence's own trouble.
            is_cut = sequence in self.ended or isinstance(sequence.error, MemoryError)
            assert got == (expected[: len(got)] if is_cut else expected), self.interruption.place


@pytest.fixture(scope="module")
def alone() -> list[list[list[int]]]:
    """What each sample of each kind writes on an engine of its own."""
    return [[tokens_alone(kind, index) for index in range(kind[1].n)] for kind in KINDS]


def tokens_alone(kind: tuple[list[int], SamplingParams], index: int) -> list[int]:
    prompt, params = kind
    engine = tiny_engine()
    seed = None if params.seed is None else params.seed + index
    sequence = engine.add_request(prompt, replace(params, n=1, seed=seed))
    run_all(engine)
    return sequence.completion_token_ids


def lines_of(alone: list[list[list[int]]]) -> list[str]:
    """Lines of a whole course; all that is to be interrupted happens in it."""
    course = Course(Interruption())
    course.run(alone)
    metrics = course.engine.metrics
    assert min(metrics.preemptions, metrics.prefix_hit_tokens, metrics.accepted_tokens) > 0
    assert metrics.drafted_tokens > metrics.accepted_tokens
    return course.interruption.lines


def places(lines: list[str], is_every: bool) -> list[int]:
    """Numbers of lines, from one: drawn, or of every line the first, the last and one between."""
    seed = random.randrange(1 << 30)
    print(f"lines drawn with seed {seed}")
    rng = random.Random(seed)
    if not is_every:
        return sorted(rng.sample(range(1, len(lines) + 1), NUM_SAMPLED))
    times: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        times.setdefault(line, []).append(number)
    return sorted({at for them in times.values() for at in (them[0], rng.choice(them), them[-1])})


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_at_any_line_changes_nobodys_tokens(
    alone: list[list[list[int]]], error: type[BaseException], is_long: bool
) -> None:
    lines = lines_of(alone)
    assert len(lines) > 2000
    for at in places(lines, is_long):
        Course(Interruption(at, error)).run(alone)


@pytest.mark.parametrize("asks", ["abort", "step", "add_request", "close", "score", "has_work"])
def test_what_a_signal_handler_asks_for_at_any_line_changes_nobodys_tokens(
    alone: list[list[list[int]]], asks: str, is_long: bool
) -> None:
    """It may end requests; all else is done, or refused where the engine is at work."""
    num_refused = 0
    for at in places(lines_of(alone), is_long):
        course = Course(Handler(at))
        course.interruption.course, course.interruption.asks = course, asks  # type: ignore[attr-defined]
        course.run(alone)
        num_refused += course.interruption.is_refused  # type: ignore[attr-defined]
    assert (num_refused > 0) == (asks not in ("abort", "has_work"))


@dataclass
class Handler(Interruption):
    """Asks for something at a line, instead of an error there."""

    course: "Course | None" = None
    asks: str = ""
    is_refused: bool = False

    def act(self) -> None:
        assert self.course is not None
        engine, sequences = self.course.engine, self.course.sequences
        try:
            if self.asks == "abort":
                if sequences:
                    self.course.ended.append(sequences[-1][0])
                    engine.abort(sequences[-1][0])
            elif self.asks == "step":
                engine.step()
            elif self.asks == "add_request":
                self.course.ended.append(engine.add_request([9, 8, 7], GREEDY))
            elif self.asks == "close":
                if engine._operation.is_mine:
                    engine.close()
            elif self.asks == "score":
                engine.score([9, 8, 7])
            else:
                assert engine.has_work in (True, False)
        except BusyError:
            self.is_refused = True


@pytest.mark.parametrize("name", ["_preempt", "_commit"])
def test_a_step_that_is_not_undone_is_seen(
    alone: list[list[list[int]]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault."""
    counting = Course(Interruption(within=name))
    counting.run(alone)
    num_lines = len(counting.interruption.lines)

    def restore(self: Undo, scheduler: Scheduler, drafting: Drafting | None) -> None:
        pass

    monkeypatch.setattr(Undo, "restore", restore)
    # From the middle, where sequences have tokens to lose.
    places = range(num_lines // 2 + 1, num_lines + 1)
    assert any(goes_wrong(Interruption(at, within=name), alone) for at in places)


def goes_wrong(interruption: Interruption, alone: list[list[list[int]]]) -> bool:
    try:
        Course(interruption).run(alone)
    except (AssertionError, ValueError, KeyError, IndexError):
        return True
    return False


def test_an_interrupt_while_undoing_is_made_good_by_the_next_operation(
    alone: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small_engine()
    sequences = [engine.add_request(*KINDS[index]) for index in range(3)]
    engine.step()
    restart, cut = Scheduler.restart, Scheduler._schedule
    monkeypatch.setattr(Scheduler, "_schedule", _interrupted)

    def half(self: Scheduler, them: list[Sequence]) -> None:
        self.blocks.reset()
        raise KeyboardInterrupt

    monkeypatch.setattr(Scheduler, "restart", half)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.setattr(Scheduler, "restart", restart)
    monkeypatch.setattr(Scheduler, "_schedule", cut)
    engine.abort(sequences[1])
    engine.scheduler.blocks.check()
    run_all(engine)
    assert sequences[1].finish_reason == "abort"
    for index in (0, 2):
        assert sequences[index].completion_token_ids == alone[index][0]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
