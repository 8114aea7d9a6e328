"""Drafting changes no token: the small model's texts with drafts and without, in every mode."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.engines import run_all
from tests.speculation import SMALL_MTP, cached, from_scratch
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.draft_length import DraftLength
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.mtp_drafter import CertainRows, MTPDrafter
from thinslice.engine.planning import Model
from thinslice.engine.sequence import Sequence, Status
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.case import Workload
from thinslice.plan.cost import PREDICTION_ROWS_HELD
from thinslice.plan.memory_plan import DraftPlan, MemoryPlan, StreamingPlan
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.units import GIB
from tools.small_mtp_text import END_OF_TEXT, TURN_END, examples

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, LONGEST, SLICE_BYTES = 50, 64, 16384
PROMPTS = [one.prompt_ids for one in islice(examples(random.Random(3), held_out=True), COUNT)]
# What changes of the plan; the last has room for about two sequences.
MODES: dict[str, dict[str, int]] = {
    "batch of 8": {},
    "one at a time": {"max_num_seqs": 1},
    "small chunks": {"chunk": 20},
    "preemption": {"num_kv_blocks": 12},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The small model in int8."""
    folder = tmp_path_factory.mktemp("packed") / "int8"
    pack_model(open_checkpoint(SMALL_MTP), folder, PackOptions(PackedFormat.INT8, "small"))
    return open_checkpoint(folder)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint, and the type that it runs in."""

    checkpoint: Checkpoint
    dtype: str


PLAIN = Loaded(open_checkpoint(SMALL_MTP), "float32")


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def model(request: pytest.FixtureRequest, packed: Checkpoint) -> Loaded:
    return Loaded(packed if request.param == "int8" else PLAIN.checkpoint, request.param)


@pytest.fixture
def full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always the longest drafts, whatever they cost, so that many are rejected."""

    def choose(self: DraftLength, num_drafting: int, num_other_rows: int = 0) -> int:
        return self.max_length if num_drafting else 0

    monkeypatch.setattr(DraftLength, "choose", choose)


def plan_of(model: Loaded, draft: str, **sizes: int) -> MemoryPlan:
    workload = Workload(320, 8, model.dtype, draft=draft, draft_length=4)
    layout = Model.of(model.checkpoint).layout(model.dtype)
    return replace(plan(model.checkpoint.shape, layout, workload, Processor.of(GIB, 0)), **sizes)


def streamed(model: Loaded, chosen: MemoryPlan) -> MemoryPlan:
    """The same with slices of a few rows, the head's and a few others pinned."""
    layout = Model.of(model.checkpoint).layout(chosen.dtype)
    num_last = len(layout.head.ranges(SLICE_BYTES)) if chosen.num_mtp_layers else 0
    streaming = StreamingPlan(
        slice_bytes=SLICE_BYTES,
        num_slices=len(layout.slices(SLICE_BYTES)),
        num_pinned=num_last + 5,
        num_buffers=3,
        buffer_bytes=SLICE_BYTES + 2 * 4096,
        num_last_pinned=num_last,
        layer_rows=6,
    )
    return replace(chosen, streaming=streaming)


def load(model: Loaded, chosen: MemoryPlan) -> Engine:
    return load_engine(model.checkpoint, chosen, frozenset({END_OF_TEXT, TURN_END}))


def params_of(index: int) -> SamplingParams:
    """Every second text is drawn."""
    temperature = 0.0 if index % 2 else 0.8
    return SamplingParams(temperature=temperature, top_p=0.98, seed=index, max_tokens=LONGEST)


def add_all(engine: Engine) -> list[Sequence]:
    return [engine.add_request(prompt, params_of(i)) for i, prompt in enumerate(PROMPTS)]


def texts(engine: Engine) -> list[list[int]]:
    sequences = add_all(engine)
    run_all(engine)
    engine.runner.close()
    assert all(sequence.finish_reason in ("stop", "length") for sequence in sequences)
    return [sequence.completion_token_ids for sequence in sequences]


@pytest.fixture(scope="module")
def plain_texts(packed: Checkpoint) -> dict[str, list[list[int]]]:
    """Without drafts, by dtype."""
    every = (PLAIN, replace(PLAIN, dtype="bfloat16"), Loaded(packed, "int8"))
    return {one.dtype: texts(load(one, plan_of(one, "off"))) for one in every}


def assert_drafted(engine: Engine) -> None:
    """Drafts were accepted, and rejected, often."""
    metrics = engine.metrics
    assert metrics.accepted_tokens > 100
    assert metrics.drafted_tokens > metrics.accepted_tokens + 100


@pytest.mark.usefixtures("full_length")
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_changes_a_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]], mode: str
) -> None:
    chosen = plan_of(model, "auto", **MODES[mode])
    engine = load(model, chosen)
    assert texts(engine) == plain_texts[chosen.dtype]
    assert_drafted(engine)
    assert (engine.metrics.preemptions > 3) == (mode == "preemption")


@pytest.mark.usefixtures("full_length")
@pytest.mark.parametrize("draft", ["ngram", "mtp"])
def test_neither_drafter_changes_a_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]], draft: str
) -> None:
    chosen = plan_of(model, draft)
    assert chosen.draft == DraftPlan(draft == "ngram", int(draft == "mtp"), 4)
    engine = load(model, chosen)
    assert bool(engine.runner.weights.predictions) == (draft == "mtp")
    assert texts(engine) == plain_texts[chosen.dtype]
    assert_drafted(engine)
    assert engine.drafting is not None
    assert list(engine.drafting.reports()) == [draft]


@pytest.mark.usefixtures("full_length")
def test_streamed_weights_change_no_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]]
) -> None:
    chosen = streamed(model, plan_of(model, "auto"))
    engine = load(model, chosen)
    assert texts(engine) == plain_texts[chosen.dtype]
    assert_drafted(engine)


@pytest.mark.usefixtures("full_length")
def test_the_hidden_state_after_the_norm_changes_no_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]]
) -> None:
    chosen = plan_of(model, "mtp")
    assert chosen.draft is not None
    engine = load(model, replace(chosen, draft=replace(chosen.draft, mtp_hidden="post-norm")))
    assert engine.drafting is not None
    assert engine.drafting.mtp is not None
    assert engine.drafting.mtp.takes_normed_hidden
    assert texts(engine) == plain_texts[chosen.dtype]


def test_lengths_as_they_are_chosen_change_no_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]]
) -> None:
    chosen = plan_of(model, "auto")
    assert texts(load(model, chosen)) == plain_texts[chosen.dtype]


@pytest.mark.usefixtures("full_length")
def test_cached_prefixes_change_no_token(
    model: Loaded, plain_texts: dict[str, list[list[int]]]
) -> None:
    chosen = plan_of(model, "auto", num_kv_blocks=600)
    engine = load(model, chosen)
    add_all(engine)
    run_all(engine)
    assert texts(engine) == plain_texts[chosen.dtype]
    assert engine.metrics.prefix_hit_tokens > 500


@pytest.mark.usefixtures("full_length")
def test_k_and_v_of_rejected_drafts_would_be_seen(
    plain_texts: dict[str, list[list[int]]],
) -> None:
    """The planted fault: what a rejected draft left counts as computed."""
    engine = load(PLAIN, plan_of(PLAIN, "auto"))
    sequences = add_all(engine)
    while engine.has_work:
        kept = [*left_by_rejected(engine)]
        engine.step()
        for place, value in kept:
            place[...] = value
    assert [one.completion_token_ids for one in sequences] != plain_texts["float32"]


def left_by_rejected(
    engine: Engine,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Where each sequence's next token is going to be written, and what lies there now."""
    for sequence in engine.scheduler.running:
        index, offset = divmod(sequence.num_computed, engine.plan.block_size)
        if sequence.num_drafted == sequence.num_accepted or index >= len(sequence.blocks):
            continue
        for cache in engine.runner.kv_caches:
            for part in (cache.k, cache.v):
                place = part[sequence.blocks[index], :, offset]
                yield place, place.copy()


# Sixteen positions to a block: two whole ones, and nothing behind.
SHARED = PROMPTS[0][:20] + PROMPTS[1][:12]


def rows_after_a_hit(engine: Engine, others: list[int], own: list[int]) -> tuple[int, bool]:
    """Another's text first, then one that begins alike: how much of it was cached, and whether the
    prediction layer's K and V are those of its whole text."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    engine.add_request(others, params)
    run_all(engine)
    sequence = engine.add_request(own, params)
    for _ in range(4):
        engine.step()
    assert sequence.status is Status.RUNNING
    assert sequence.num_settled > len(SHARED)
    return sequence.num_cached, rows_are_right(engine, sequence)


def rows_are_right(engine: Engine, sequence: Sequence) -> bool:
    """Whether the prediction layers' K and V are those of the sequence's text run at once, bit for
    bit."""
    weights, num_rows = engine.runner.weights, sequence.num_settled
    assert engine.drafting is not None
    assert engine.drafting.mtp is not None
    kept = [
        one
        for layer in engine.drafting.mtp.layers
        for one in cached(layer.kv_cache, sequence.blocks, num_rows)
    ]
    num_ahead = len(engine.drafting.mtp.layers)
    token_ids, kv_dtype = sequence.tokens(0, num_rows + num_ahead), kept[0].dtype
    expected, _ = from_scratch(weights, token_ids, 1, num_rows, kv_dtype)
    return all(np.array_equal(a, b) for a, b in zip(kept, expected, strict=True))


@pytest.mark.usefixtures("full_length")
def test_a_cached_block_is_right_for_the_prediction_layer_too(model: Loaded) -> None:
    """Who goes on otherwise after a block's last token must not take its last row."""
    first, *rest = tail = PROMPTS[2][:9]
    otherwise = [(first + 1) % 256, *rest]

    def after(others: list[int], own: list[int]) -> tuple[int, bool]:
        return rows_after_a_hit(load(model, plan_of(model, "mtp")), others, own)

    assert after([*SHARED, *tail], [*SHARED, *otherwise]) == (16, True)
    assert after([*SHARED, *tail], [*SHARED, first, *otherwise]) == (32, True)
    assert after([*SHARED, *tail], [*SHARED, *tail]) == (32, True)


@pytest.mark.usefixtures("full_length")
def test_a_block_found_by_its_own_tokens_alone_would_be_seen(model: Loaded) -> None:
    first, *rest = PROMPTS[2][:9]
    engine = load(model, plan_of(model, "mtp"))
    engine.scheduler.blocks.lookahead = 0
    others, own = [*SHARED, first, *rest], [*SHARED, (first + 1) % 256, *rest]
    assert rows_after_a_hit(engine, others, own) == (32, False)


def test_rows_wait_while_nothing_is_drafted_and_are_right_when_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A block is shared only once the prediction layer has taken in its rows."""
    lengths = [0]
    monkeypatch.setattr(DraftLength, "choose", lambda *_: lengths[0])
    engine = load(PLAIN, plan_of(PLAIN, "mtp"))
    params = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    sequence = engine.add_request(SHARED, params)
    waiting = []
    while len(sequence.completion_token_ids) < 50:
        engine.step()
        waiting.append(sequence.num_held)
        num_full = sequence.num_settled // engine.plan.block_size
        assert engine.scheduler.blocks.num_cached == num_full
    assert (min(waiting), max(waiting)) == (0, PREDICTION_ROWS_HELD - 1)
    assert sequence.num_drafted == 0
    assert sequence.num_held > 0
    lengths[0] = 1
    for _ in range(4):
        engine.step()
        assert sequence.num_held == 0
    assert sequence.num_drafted == 3
    assert rows_are_right(engine, sequence)


@pytest.mark.parametrize("breaks", ["propose", "_take_in"])
def test_an_interrupted_step_drafts_again(
    plain_texts: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """Every fourth step is broken off while it drafts, before or after what it does."""
    engine = load(PLAIN, plan_of(PLAIN, "auto"))
    original, calls = getattr(MTPDrafter, breaks), count()

    def broken(drafter: MTPDrafter, sequences: list[CertainRows]) -> object:
        done = original(drafter, sequences)
        is_own = engine.drafting is not None and drafter is engine.drafting.mtp
        if is_own and next(calls) % 4 == 0:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(MTPDrafter, breaks, broken)
    sequences = add_all(engine)
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            engine.scheduler.blocks.check()
        for sequence in engine.scheduler.running[:1]:
            assert sequence.num_settled == 0 or rows_are_right(engine, sequence)
    assert [one.completion_token_ids for one in sequences] == plain_texts["float32"]
