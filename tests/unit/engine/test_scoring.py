"""How likely given tokens are: by logits in any tiles, in any chunk, beside anything that runs."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.arrays import log_softmax
from tests.engines import logits_of, run_all, tiny_engine
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine import results
from thinslice.engine.draws import Draws
from thinslice.engine.engine import Engine
from thinslice.engine.logprobs import Logprobs, TokenLogprobs
from thinslice.engine.sampler import Chosen, token_logprobs
from thinslice.engine.scheduler import ScheduledTokens
from thinslice.engine.scoring import Scores
from thinslice.engine.sequence import Scored, Sequence
from thinslice.errors import BusyError, CheckpointError, ContextError, RequestError
from thinslice.model.weights import Weights
from thinslice.plan.memory_plan import Pool
from thinslice.units import KIB

RNG = random.Random(4)
TOKENS = [RNG.randrange(3, 64) for _ in range(50)]
OTHERS = [RNG.randrange(3, 64) for _ in range(20)]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def scheduled(num_rows: list[int], num_top: list[int]) -> list[ScheduledTokens]:
    """Runs of that many rows, all of them scored."""
    runs = []
    for index, (count, top) in enumerate(zip(num_rows, num_top, strict=True)):
        tokens = [(7 * place + index) % 40 for place in range(count + 1)]
        scored = Scored(1, top)
        sequence = Sequence(index, tokens, GREEDY, len(tokens), Draws(0), scored=scored)
        runs.append(ScheduledTokens(sequence, count, num_scored=count))
    return runs


def in_tiles(scores: Scores, logits: np.ndarray, rows: int, ids: int, by_rows: bool) -> None:
    firsts = [(r, i) for r in range(0, len(logits), rows) for i in range(0, logits.shape[1], ids)]
    for row, first_id in firsts if by_rows else sorted(firsts, key=lambda one: one[::-1]):
        scores.add(row, first_id, logits[row : row + rows, first_id : first_id + ids])


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(("rows", "ids"), [(1, 40), (9, 40), (9, 7), (2, 1), (3, 39), (9, 20)])
def test_tiles_of_any_kind_give_what_whole_rows_give(rows: int, ids: int, by_rows: bool) -> None:
    """With ties, negative zeros, and logits far apart."""
    logits = np.random.default_rng(3).normal(0, 8, (9, 40)).astype(np.float32)
    logits[:, ::3] = logits[:, 1::3][:, :14][:, : logits[:, ::3].shape[1]][:, :1]
    logits[2, 4:9], logits[3], logits[4, 5], logits[5, 5] = -0.0, 0.0, 3e4, -3e4
    runs = scheduled([4, 0, 5], [3, 2, 40])
    scores = Scores(runs, 40, 1)
    in_tiles(scores, logits, rows, ids, by_rows)
    first, none, last = scores.results()
    assert len(none) == 0
    expected = []
    for run in (runs[0], runs[2]):
        assert run.sequence.scored is not None
        for row, target in enumerate(run.sequence.prompt_token_ids[1:], len(expected)):
            chosen = Chosen(target, 0.0)
            expected.append(token_logprobs(logits[row], chosen, run.sequence.scored.num_top))
    assert isinstance(first, Logprobs)
    assert isinstance(last, Logprobs)
    for got, wanted in zip([*first, *last], expected, strict=True):
        assert_close(got, wanted, 0 if ids == 40 else 1e-12)


def assert_close(got: TokenLogprobs, wanted: TokenLogprobs, tolerance: float) -> None:
    assert got.logprob == pytest.approx(wanted.logprob, rel=tolerance, abs=tolerance)
    assert [one for one, _ in got.top] == [one for one, _ in wanted.top]
    values = [one for _, one in wanted.top]
    assert [one for _, one in got.top] == pytest.approx(values, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error_of_their_own_sequence(bad: float) -> None:
    logits = np.zeros((9, 40), np.float32)
    logits[6, 11] = bad
    scores = Scores(scheduled([4, 5], [0, 0]), 40, 1)
    in_tiles(scores, logits, 4, 20, by_rows=True)
    good, wrong = scores.results()
    assert [one.logprob for one in good] == pytest.approx([-np.log(40)] * 4)
    assert isinstance(wrong, CheckpointError)


def test_scores_that_the_plan_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(pools=(Pool("--memory", 0),))
    monkeypatch.setattr(results, "CALLER_BYTES", 50 * KIB)
    kept = [engine.add_scored(TOKENS, num_top=20) for _ in range(3)]
    with pytest.raises(BusyError, match=r"log-probabilities take 13.* more and the plan leaves 8"):
        engine.add_scored(TOKENS, num_top=20)
    run_all(engine)
    assert all(one.finish_reason == "scored" for one in kept)
    kept.clear()
    assert len(engine.score(TOKENS, num_top=20)) == 49


def expected_scores(engine: Engine, token_ids: list[int], start: int) -> list[float]:
    """From the logits of the whole text, run at once."""
    log_probs = log_softmax(logits_of(engine, token_ids))
    return [float(log_probs[at - 1, token_ids[at]]) for at in range(start, len(token_ids))]


def scores_of(engine: Engine, start: int = 1) -> list[float]:
    return [one.logprob for one in engine.score(TOKENS, start)]


@pytest.mark.parametrize("chunk", [1, 3, 16, 32, 64])
@pytest.mark.parametrize("start", [1, 2, 17, 49])
def test_scores_are_those_of_the_whole_text(start: int, chunk: int) -> None:
    engine = tiny_engine(chunk=chunk)
    expected = expected_scores(tiny_engine(), TOKENS, start)
    assert scores_of(engine, start) == pytest.approx(expected, abs=1e-5)
    # Once more, where the cache has the text before the start, and none of what is scored.
    before = engine.metrics.prefix_hit_tokens
    assert scores_of(engine, start) == pytest.approx(expected, abs=1e-5)
    assert engine.metrics.prefix_hit_tokens - before == (start - 1) // 4 * 4
    assert engine.metrics.requests == {"scored": 2}
    assert engine.metrics.completion_tokens == 0
    engine.scheduler.blocks.check()
    assert not engine.has_work


def test_the_likeliest_tokens_are_told_and_a_greedy_completion_is_likeliest() -> None:
    engine = tiny_engine()
    written = engine.add_request(TOKENS[:9], replace(GREEDY, logprobs=3))
    run_all(engine)
    scores = engine.score([*TOKENS[:9], *written.completion_token_ids], 9, num_top=3)
    for got, wanted in zip(scores, written.logprobs, strict=True):
        assert_close(got, wanted, 1e-5)
        assert got.top[0][0] in written.completion_token_ids
    assert [one.top[0][0] for one in scores] == written.completion_token_ids


def test_completions_that_run_beside_are_what_they_are_alone() -> None:
    alone = tiny_engine()
    written = alone.add_request(OTHERS, replace(GREEDY, logprobs=0))
    run_all(alone)
    engine = tiny_engine(chunk=12, num_kv_blocks=16)
    sequences = [engine.add_request(OTHERS[:], replace(GREEDY, logprobs=0)) for _ in range(3)]
    scored = [engine.add_scored(TOKENS, start) for start in (1, 30)]
    run_all(engine)
    assert engine.metrics.preemptions > 0
    for sequence in sequences:
        assert sequence.completion_token_ids == written.completion_token_ids
        for got, wanted in zip(sequence.logprobs, written.logprobs, strict=True):
            assert_close(got, wanted, 1e-5)
    for sequence, start in zip(scored, (1, 30), strict=True):
        got = [one.logprob for one in sequence.logprobs]
        assert got == pytest.approx(expected_scores(tiny_engine(), TOKENS, start), abs=1e-5)


def test_no_tile_has_more_logits_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_num_seqs=2, chunk=16)
    most, decoder = [], engine.runner.decoder
    tiles = decoder.logit_tiles

    def seen(x_TD: np.ndarray, weights: Weights, most_elements: int) -> object:
        for first_row, first_id, tile in tiles(x_TD, weights, most_elements):
            most.append(tile.size)
            yield first_row, first_id, tile

    monkeypatch.setattr(decoder, "logit_tiles", seen)
    engine.score(TOKENS)
    assert max(most) == 2 * 64
    most.clear()
    engine.add_request(OTHERS, replace(GREEDY, max_tokens=30))
    engine.add_scored(TOKENS)
    run_all(engine)
    assert max(most) == 64, "beside a row that is sampled"


def test_a_text_that_is_not_scored_in_time_is_told() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match="scoring was ended: deadline"):
        engine.score(TOKENS, scheduling=Scheduling(deadline_s=0.0))
    salts = ("a", "b", "a")
    for salt in salts:
        engine.score(TOKENS, start=40, scheduling=Scheduling(cache_salt=salt))
    assert engine.metrics.prefix_hit_tokens > 0
    assert engine.metrics.prefix_hit_tokens < len(TOKENS), "one shared with another of its salt"


def test_a_wrong_text_is_refused() -> None:
    engine = tiny_engine()
    for tokens, start, told in (
        ([], 1, "start is 1 for a text of 0 tokens"),
        ([5], 1, "start is 1 for a text of 1 tokens"),
        (TOKENS, 0, "start is 0"),
        (TOKENS, 50, "start is 50"),
        ([*TOKENS, 64], 1, "token id 64 is outside the vocabulary of 64"),
        ([-1, 2], 1, "token id -1 is outside"),
    ):
        with pytest.raises(RequestError, match=told):
            engine.score(tokens, start)
    with pytest.raises(ContextError, match="the text has 65 tokens and the context is 64"):
        engine.score([5] * 65)
    assert len(engine.score([5] * 64)) == 63
    with pytest.raises(RequestError, match="num_top is 21"):
        engine.score(TOKENS, num_top=21)
    assert not engine.has_work


HUGE = 10**5000
NO_IDS: list[object] = [
    None, True, 5, 1.5, "ab", b"ab", {5: 6}, {5, 6}, range(3), HUGE,
    [1.9, 2.5, 3.9], [True, False, 1], [None], ["a"], [[1, 2]], [[]], [1, HUGE, "x"],
    np.array([1.0, 2.0]), np.array([[1, 2], [3, 4]]), np.array(3), np.array([True, False]),
    [np.float64(1.0), 2], [np.bool_(True), 2],
]  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS, ids=lambda ids: type(ids).__name__)
def test_what_is_no_list_of_token_ids_is_refused(ids: Any) -> None:
    engine = tiny_engine()
    for queue in (engine.score, lambda ids: engine.add_request(ids, GREEDY)):
        with pytest.raises(RequestError, match=r"^token ids are .*; expected a list or an array"):
            queue(ids)
    assert not engine.has_work


def test_an_id_of_many_digits_is_outside_the_vocabulary() -> None:
    engine = tiny_engine()
    for ids in ([1, HUGE], [-HUGE, 1]):
        for queue in (engine.score, lambda ids: engine.add_request(ids, GREEDY)):
            with pytest.raises(RequestError, match="token id a int that cannot be written out is"):
                queue(ids)


def test_token_ids_in_a_tuple_or_of_numpy_are_those_of_a_list() -> None:
    engine = tiny_engine()
    expected = [*engine.score(TOKENS, 3, 2)]
    for ids in (tuple(TOKENS), np.array(TOKENS, np.uint8), [np.int64(one) for one in TOKENS]):
        assert [*engine.score(ids, np.int32(3), np.int64(2))] == expected  # type: ignore[arg-type]
        sequence = engine.add_request(ids, GREEDY)  # type: ignore[arg-type]
        assert {*map(type, sequence.prompt_token_ids)} == {int}
        assert sequence.prompt_token_ids == TOKENS
        engine.abort(sequence)


@pytest.mark.parametrize("wrong", [None, True, 1.5, "1", [1], np.array([1, 2]), np.float32(1)])
@pytest.mark.parametrize("name", ["start", "num_top"])
def test_what_is_no_number_of_tokens_is_refused(name: str, wrong: Any) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match=f"^{name} is .*; expected an int$"):
        engine.score(TOKENS, **{name: wrong})
    with pytest.raises(RequestError, match=f"^{name} is a int that cannot be written out"):
        engine.score(TOKENS, **{name: HUGE})
    assert not engine.has_work


@pytest.mark.parametrize("wrong", [True, 1, "x", {}, [Scheduling()], SamplingParams()])
def test_what_is_no_scheduling_and_no_params_is_refused(wrong: Any) -> None:
    engine = tiny_engine()
    engine.abort(engine.add_request(TOKENS, GREEDY, scheduling=None))
    assert len(engine.score(TOKENS, scheduling=None)) == 49
    for queue in (
        engine.score,
        lambda ids, scheduling: engine.add_request(ids, GREEDY, None, wrong),
    ):
        with pytest.raises(RequestError, match=r"^scheduling is .*; expected Scheduling"):
            queue(TOKENS, scheduling=wrong)
    if not isinstance(wrong, SamplingParams):
        with pytest.raises(RequestError, match=r"^params is .*; expected SamplingParams"):
            engine.add_request(TOKENS, wrong)
    assert not engine.has_work


def test_scoring_that_somebody_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(chunk=8)
    step = engine.step

    def aborting() -> None:
        step()
        engine.abort(engine.scheduler.running[0])

    monkeypatch.setattr(engine, "step", aborting)
    with pytest.raises(RequestError, match="scoring was ended: abort"):
        engine.score(TOKENS)
    monkeypatch.undo()
    assert len(engine.score(TOKENS)) == 49
