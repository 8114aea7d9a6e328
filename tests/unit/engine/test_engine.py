"""The engine's rules, each on a one-layer model: what changes no token, and how a request ends."""

import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.arrays import log_softmax
from tests.engines import logits_of, run_all, tiny_engine
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.engine import Engine
from thinslice.engine.sequence import Sequence, Status, StepOutput
from thinslice.errors import CheckpointError, RequestError

PROMPT = [3, 9, 27, 41, 5, 15, 45, 9, 27]
DRAWN = SamplingParams(temperature=1.2, top_p=0.95, seed=5, max_tokens=12, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def tokens_of(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    sequence = engine.add_request(prompt, params)
    run_all(engine)
    return sequence.completion_token_ids


@pytest.mark.parametrize("params", [DRAWN, GREEDY], ids=["drawn", "greedy"])
def test_a_cached_prefix_gives_the_tokens_of_a_computed_one(params: SamplingParams) -> None:
    expected = tokens_of(tiny_engine(), PROMPT, params)
    engine = tiny_engine()
    assert tokens_of(engine, PROMPT, params) == expected
    again = engine.add_request(PROMPT, params)
    run_all(engine)
    assert (again.num_cached, again.completion_token_ids) == (8, expected)
    longer = engine.add_request([*PROMPT, *expected[:6]], replace(params, max_tokens=1))
    run_all(engine)
    assert longer.num_cached == 12, "the completion of another is found as well"
    assert engine.metrics.prefix_hit_tokens == 20


@pytest.mark.parametrize("params", [DRAWN, GREEDY], ids=["drawn", "greedy"])
def test_a_sequence_that_gave_way_goes_on_as_if_nothing_had_been(params: SamplingParams) -> None:
    expected = tokens_of(tiny_engine(), PROMPT, params)
    engine = tiny_engine(num_kv_blocks=9)
    first = engine.add_request([7] * 9, GREEDY)
    last = engine.add_request(PROMPT, params)
    run_all(engine)
    assert last.num_preemptions > 0
    assert last.completion_token_ids == expected
    assert first.completion_token_ids == tokens_of(tiny_engine(), [7] * 9, GREEDY)
    assert engine.metrics.preemptions == last.num_preemptions


def test_samples_share_blocks_and_are_what_their_seeds_give_alone() -> None:
    engine = tiny_engine()
    samples = engine.add_samples(PROMPT, replace(DRAWN, n=3))
    run_all(engine)
    alone = [tokens_of(tiny_engine(), PROMPT, replace(DRAWN, seed=5 + i)) for i in range(3)]
    assert [sample.completion_token_ids for sample in samples] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert [sample.num_cached for sample in samples] == [0, 8, 8]


def test_samples_go_on_where_the_first_of_them_is_aborted() -> None:
    engine = tiny_engine()
    first, second = engine.add_samples(PROMPT, replace(DRAWN, n=2))
    engine.abort(first)
    run_all(engine)
    assert second.completion_token_ids == tokens_of(tiny_engine(), PROMPT, replace(DRAWN, seed=6))


@pytest.mark.parametrize("params", [DRAWN, GREEDY], ids=["drawn", "greedy"])
def test_drafts_right_or_wrong_change_no_token(params: SamplingParams) -> None:
    expected = tokens_of(tiny_engine(), PROMPT, params)
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, params)
    engine.step()
    num_steps = 1
    while engine.has_work:
        done = len(sequence.completion_token_ids)
        wrong = (expected[done] + 1) % 64
        sequence.draft_token_ids = (
            [*expected[done : done + 2], wrong, 3] if num_steps % 2 else [wrong, 4]
        )
        engine.step()
        engine.scheduler.blocks.check()
        num_steps += 1
    assert sequence.completion_token_ids == expected
    assert num_steps < 9
    assert 4 <= engine.metrics.accepted_tokens < engine.metrics.drafted_tokens


def test_a_token_that_ends_the_sequence_ends_it_among_accepted_drafts_too() -> None:
    expected = tokens_of(tiny_engine(), PROMPT, GREEDY)
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, replace(GREEDY, stop_token_ids=(expected[2],)))
    engine.step()
    sequence.draft_token_ids = expected[1:6]
    (output,) = engine.step()
    end = expected.index(expected[2]) + 1
    assert sequence.completion_token_ids == expected[:end]
    assert (output.token_ids, output.finish_reason) == (tuple(expected[1:end]), "stop")


def test_logprobs_are_those_of_the_models_logits() -> None:
    engine = tiny_engine()
    params = replace(DRAWN, logprobs=3, frequency_penalty=1.0, top_k=4)
    sequence = engine.add_request(PROMPT, params)
    run_all(engine)
    everything = PROMPT + sequence.completion_token_ids
    expected_TV = log_softmax(logits_of(tiny_engine(), everything)[len(PROMPT) - 1 :])
    assert len(sequence.logprobs) == len(sequence.completion_token_ids)
    chosen = zip(sequence.completion_token_ids, sequence.logprobs, expected_TV, strict=False)
    for token_id, got, expected_V in chosen:
        ids = [token_id, *(top_id for top_id, _ in got.top)]
        values = [got.logprob, *(value for _, value in got.top)]
        np.testing.assert_allclose(values, expected_V[ids], rtol=1.3e-6, atol=1e-5)
        assert ids[1:] == np.argsort(-expected_V)[:3].tolist()


def test_a_request_past_its_deadline_ends_wherever_it_is() -> None:
    engine = tiny_engine(max_num_seqs=1)
    now = [0.0]
    engine.clock = lambda: now[0]
    running = engine.add_request(PROMPT, GREEDY, scheduling=Scheduling(deadline_s=5.0))
    waiting = engine.add_request(PROMPT, GREEDY, scheduling=Scheduling(deadline_s=2.0))
    last = engine.add_request(PROMPT, GREEDY)
    engine.step()
    now[0] = 2.0
    assert engine.step() == [StepOutput(waiting, (), "deadline")]
    engine.step()
    now[0] = 6.0
    assert engine.step() == [StepOutput(running, (), "deadline")]
    assert len(running.completion_token_ids) == 2
    run_all(engine)
    assert last.finish_reason == "length"
    assert engine.metrics.requests == {"deadline": 2, "length": 1}


def test_trouble_in_one_request_ends_it_alone() -> None:
    engine = tiny_engine()
    expected = tokens_of(tiny_engine(), PROMPT, GREEDY)
    seen: list[StepOutput] = []

    def fails_at_the_third(output: StepOutput) -> None:
        seen.append(output)
        if len(seen) == 3:
            raise ZeroDivisionError("mine")

    failing = engine.add_request([5, 6], GREEDY, on_output=fails_at_the_third)
    other = engine.add_request(PROMPT, GREEDY)
    engine.step()
    engine.step()
    outputs = engine.step()
    assert [output.finish_reason for output in outputs] == ["error", None]
    assert (failing.finish_reason, str(failing.error)) == ("error", "mine")
    assert not failing.blocks
    run_all(engine)
    assert other.completion_token_ids == expected
    assert engine.metrics.requests == {"error": 1, "length": 1}


def test_a_callback_that_fails_on_the_last_token_is_an_error_too() -> None:
    engine = tiny_engine()

    def fails(output: StepOutput) -> None:
        if output.finish_reason is not None:
            raise KeyError("late")

    sequence = engine.add_request(PROMPT, replace(GREEDY, max_tokens=2), on_output=fails)
    run_all(engine)
    assert sequence.finish_reason == "error"
    assert {reason: n for reason, n in engine.metrics.requests.items() if n} == {"error": 1}


def test_logits_that_are_no_numbers_end_the_sequence_that_has_them() -> None:
    engine = tiny_engine()
    table = engine.runner.weights.source.vector("model.embed_tokens.weight")
    table[50] = float("nan")
    broken, sound = engine.add_request([4, 50], GREEDY), engine.add_request(PROMPT, GREEDY)
    run_all(engine)
    assert isinstance(broken.error, CheckpointError)
    assert sound.completion_token_ids == tokens_of(tiny_engine(), PROMPT, GREEDY)


def test_an_abort_frees_the_blocks_at_once() -> None:
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, GREEDY)
    engine.step()
    assert engine.metrics.kv_blocks_used == 3
    engine.abort(sequence)
    assert engine.scheduler.blocks.num_free == 64
    assert (engine.metrics.kv_blocks_used, engine.metrics.num_running) == (0, 0)
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 24, {}, "has 24 tokens and the context is 24; at most 23"),
        ([5] * 20, {"max_tokens": 5}, "max_tokens 4 fits"),
        ([64], {}, "token id 64 is outside the vocabulary of 64"),
        ([3, -1, 7], {}, "token id -1 is outside"),
        ([3], {"n": 2}, "n is 2; this gives one completion"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(
    prompt: list[int], params: dict[str, int], message: str
) -> None:
    engine = tiny_engine(num_kv_blocks=6)  # fewer positions than the context
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert not engine.has_work


def test_a_step_that_fails_leaves_every_sequence_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine()
    sequence = engine.add_request(PROMPT, DRAWN)
    engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "run", _raise)
        with pytest.raises(OSError, match="disk"):
            engine.step()
    assert sequence.status is Status.RUNNING
    run_all(engine)
    assert sequence.completion_token_ids == tokens_of(tiny_engine(), PROMPT, DRAWN)


def _raise(*args: object) -> None:
    raise OSError("disk")


def test_metrics_add_up() -> None:
    engine = tiny_engine()
    sequences: list[Sequence] = engine.add_samples(PROMPT, replace(GREEDY, n=2))
    run_all(engine)
    metrics = engine.metrics
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (len(PROMPT), 24)
    assert metrics.steps == metrics.run_s.count == metrics.schedule_s.count
    assert metrics.time_to_first_token_s.count == metrics.time_per_token_s.count == len(sequences)
    assert metrics.sweep_s.count == 0, "nothing is streamed"
    assert metrics.kv_blocks_cached == engine.scheduler.blocks.num_cached > 0


def test_threads_that_add_at_once_get_ids_of_their_own() -> None:
    engine, added = tiny_engine(num_kv_blocks=400), list[int]()
    interval = sys.getswitchinterval()
    params = SamplingParams(max_tokens=1, n=4, seed=1)

    def add() -> None:
        for _ in range(60):
            added.extend(one.seq_id for one in engine.add_samples([1, 2, 3], params))

    threads = [threading.Thread(target=add) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len({*added}) == len(added) == 8 * 60 * 4
