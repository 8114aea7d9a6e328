"""LLM on a tiny random model: text, chat, streams, stops, and what is left when something fails."""

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_llm import TEMPLATE, beside, write_model
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine import advance, results
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.contained import Contained
from thinslice.engine.llm import LLM
from thinslice.engine.prompts import Prompt
from thinslice.engine.request import Delta, Request
from thinslice.engine.results import ANSWERS, ResultsRoom
from thinslice.engine.runner import Runner
from thinslice.engine.sampler import Sampled, sample_rows
from thinslice.engine.scored_request import ScoredRequest
from thinslice.engine.sequence import Sequence
from thinslice.errors import BudgetError, BusyError, ConfigError, RequestError, StoreError
from thinslice.plan import choose, search
from thinslice.text.incremental import StopStringMatcher
from thinslice.text.messages import Conversation
from thinslice.units import GIB, KIB

LONG = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=24, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, memory=beside(GIB), context=128, dtype="float32", max_num_seqs=3)


def assert_idle(llm: LLM) -> None:
    """Nothing runs and every block is free."""
    blocks = llm.engine.scheduler.blocks
    blocks.check()
    assert not llm.engine.has_work
    assert blocks.num_free == blocks.num_blocks


def test_several_prompts_give_what_each_gives_alone(llm: LLM) -> None:
    prompts = [f"prompt {number}" * (number + 1) for number in range(5)]
    together = llm.generate(prompts, LONG)
    alone = [llm.generate(prompt, LONG)[0] for prompt in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert all(len(c.token_ids) == 24 and c.finish_reason == "length" for c in together)
    assert_idle(llm)


def test_generate_gives_n_completions_for_each_prompt_and_tells_its_progress(llm: LLM) -> None:
    prompts, calls = ["abc", "xyz"], []
    several = llm.generate(
        prompts, replace(LONG, n=2), progress=lambda done, total: calls.append((done, total))
    )
    alone = [llm.generate(p, replace(LONG, seed=3 + i))[0] for p in prompts for i in range(2)]
    assert [c.token_ids for c in several] == [c.token_ids for c in alone]
    assert [(c.index, c.seed) for c in several] == [(0, 3), (1, 4), (0, 3), (1, 4)]
    assert calls[-1] == (4, 4)
    assert calls == sorted(calls)
    assert_idle(llm)


def test_each_prompt_may_have_params_of_its_own(llm: LLM) -> None:
    short, long = llm.generate(["abc", "xyz"], [replace(LONG, max_tokens=2), LONG])
    assert (len(short.token_ids), len(long.token_ids)) == (2, 24)
    with pytest.raises(RequestError, match="2 params for 1 prompts"):
        llm.generate(["abc"], [LONG, LONG])
    with pytest.raises(RequestError, match="n is 2; a stream gives one completion"):
        llm.stream("abc", replace(LONG, n=2))
    assert_idle(llm)


def test_trouble_with_one_text_ends_it_alone_and_is_raised_by_a_stream(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("xyz", LONG)[0].text
    push = StopStringMatcher.push

    def fails_for_abc(self: StopStringMatcher, text: str) -> str:
        if "a stop" in self._stops:
            raise ZeroDivisionError("mine")
        return push(self, text)

    monkeypatch.setattr(StopStringMatcher, "push", fails_for_abc)
    bad, good = llm.generate(["abc", "xyz"], [replace_stop("a stop"), LONG])
    assert (bad.finish_reason, str(bad.error)) == ("error", "mine")
    assert (good.finish_reason, good.text) == ("length", expected)
    with pytest.raises(ZeroDivisionError, match="mine"):
        list(llm.stream("abc", replace_stop("a stop")))
    assert_idle(llm)


def test_the_stream_in_sum_is_the_text(llm: LLM) -> None:
    stream = llm.stream("abc", LONG)
    text = "".join(chunk.text for chunk in stream)
    assert text == stream.completion.text == llm.generate("abc", LONG)[0].text
    assert text == llm.tokenizer.decode(stream.completion.token_ids)


def test_two_streams_side_by_side_lose_nothing(llm: LLM) -> None:
    first, second = llm.stream("abc", LONG), llm.stream("xyz", LONG)
    pieces: dict[str, str] = {"a": "", "b": ""}
    for chunk in first:
        pieces["a"] += chunk.text
    for chunk in second:
        pieces["b"] += chunk.text
    assert [pieces["a"], pieces["b"]] == [c.text for c in llm.generate(["abc", "xyz"], LONG)]


def test_a_stream_left_early_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream("abc", LONG)
    for chunk in stream:
        if chunk.text:
            break
    iterator = iter(stream)
    iterator.close()
    assert stream.completion.finish_reason == "abort"
    assert_idle(llm)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate("abc", LONG)[0].text
    stop = whole[5:7]
    stopped = llm.generate("abc", replace_stop(stop))[0]
    assert stopped.text == whole[: whole.find(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 24
    assert_idle(llm)


def replace_stop(*stops: str) -> SamplingParams:
    return SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=24, seed=3, ignore_eos=True, stop=stops
    )


def test_an_end_id_ends_and_is_no_text(llm: LLM) -> None:
    ids = llm.generate("abc", LONG)[0].token_ids
    params = SamplingParams(
        temperature=1.0, top_p=1.0, max_tokens=24, seed=3, stop_token_ids=(ids[4],)
    )
    done = llm.generate("abc", params)[0]
    assert done.finish_reason == "stop"
    assert done.token_ids == ids[: ids.index(ids[4]) + 1]
    assert done.text == llm.tokenizer.decode(done.token_ids[:-1])


def test_chat_renders_the_template_and_keeps_an_empty_system_prompt(llm: LLM) -> None:
    user = {"role": "user", "content": "hi"}
    plain = llm.chat([user], LONG)
    empty = llm.chat([{"role": "system", "content": ""}, user], LONG)
    rendered = llm.tokenizer.decode(empty.prompt_token_ids, skip_special_tokens=False)
    assert rendered.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")
    assert len(plain.prompt_token_ids) < len(empty.prompt_token_ids)
    assert 257 in plain.prompt_token_ids


def test_a_model_that_cannot_write_the_tags_of_thoughts_chats_all_the_same(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_tokenizer: object) -> None:
        raise RequestError("this model's tokenizer cannot write </think>; set no budget")

    monkeypatch.setattr("thinslice.engine.prompts.ThoughtTokens", refuse)
    monkeypatch.delitem(vars(llm._prompts), "_tags", raising=False)
    asked = [{"role": "user", "content": "Hi"}]
    assert llm.chat(asked, SamplingParams(max_tokens=4)).token_ids
    with pytest.raises(RequestError, match="set no budget"):
        llm.chat(asked, SamplingParams(max_tokens=4, max_thinking_tokens=9))


def test_reasoning_is_apart_where_the_prompt_opens_it(tmp_path: Path) -> None:
    path = write_model(tmp_path / "thinker.gguf", TEMPLATE + "<think>\n")
    llm = LLM(str(path), memory=beside(GIB), context=128, dtype="float32")
    done = llm.chat([{"role": "user", "content": "hi"}], LONG)
    assert done.text == ""
    assert done.reasoning == llm.tokenizer.decode(done.token_ids).strip("\n")


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("x" * 128, {}, "the prompt has 128 tokens and the context is 128; at most 127"),
        ("x" * 100, {"max_tokens": 29}, "max_tokens 28 fits"),
        ("\ud800", {}, "not valid Unicode"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_at_once(
    llm: LLM, prompt: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.stream(prompt, SamplingParams(**params))
    assert_idle(llm)


def test_what_is_no_conversation_and_no_params_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="a conversation is a list of messages"):
        llm.chat("hi")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="message 1 has the role 'usr', which is unknown"):
        llm.chat([{"role": "usr", "content": "x"}])
    with pytest.raises(RequestError, match="more than 128 tokens"):
        llm.chat(Conversation([{"role": "user", "content": "x"}], [{"function": {"name": "f"}}]))
    for params in ({"temperature": 0}, [{"temperature": 0}], "greedy"):
        with pytest.raises(RequestError, match=r"expected SamplingParams\(\.\.\.\)"):
            llm.generate(["a"], params)  # type: ignore[arg-type]
    assert_idle(llm)


def test_a_prompt_of_tokens_is_of_ints(llm: LLM) -> None:
    assert llm.prepare_tokens(np.array([1, 2]), LONG).token_ids == [1, 2]
    assert llm.prepare_tokens((1, 2)).token_ids == [1, 2]
    wrong: list[Any] = [None, "ab", 5, [1.5], [True], [[1]], np.array([1.0])]
    for ids in wrong:
        with pytest.raises(RequestError, match=r"^token ids are .*; expected a list or an array"):
            llm.prepare_tokens(ids, LONG)
    with pytest.raises(RequestError, match=r"^params is 'x'"):
        llm.prepare_tokens([1], "x")  # type: ignore[arg-type]


def test_one_bad_prompt_among_several_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError):
        llm.generate(["good", "x" * 500], LONG)
    assert_idle(llm)


def test_a_model_without_a_template_does_not_chat(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", chat_template="")
    llm = LLM(str(path), memory=beside(GIB), context=64, dtype="float32")
    with pytest.raises(RequestError, match=r"empty\) chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
    assert llm.generate("abc", LONG)[0].token_ids


def test_a_streamed_model_ends_its_threads_when_it_is_closed(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And closing it once more does nothing."""
    monkeypatch.setattr(choose, "resident", lambda *args: ())
    monkeypatch.setattr(search, "with_pinned_slices", lambda case, chosen: chosen)
    before = threading.active_count()
    with LLM(model, memory=beside(GIB), context=64, dtype="float32") as llm:
        assert threading.active_count() > before
    assert threading.active_count() == before
    llm.close()
    with pytest.raises(RequestError, match="this model is closed"):
        llm.generate("abc", LONG)


def test_closing_lets_the_weights_go(model: str) -> None:
    with LLM(model, memory=beside(GIB), context=64, dtype="float32") as llm:
        weights = weakref.ref(llm.engine.runner.weights)
        llm.generate("abc", LONG)
    gc.collect()
    assert weights() is None


def test_settings_out_of_range_are_refused_before_anything_is_loaded(model: str) -> None:
    with pytest.raises(BudgetError, match=r"no plan fits memory=.1MiB"):
        LLM(model, memory="1MiB")
    with pytest.raises(ConfigError, match="dtype 'int3' is unknown"):
        LLM(model, dtype="int3")
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        LLM(model, max_num_seqs=0)
    with pytest.raises(ConfigError, match="memory is 0; expected bytes"):
        LLM(model, memory=0)
    with pytest.raises(StoreError, match="org/none"):
        LLM("org/none", offline=True)
    for settings, message in (
        ({"context": 1.5}, "context is 1.5; expected a whole number"),
        ({"context": "512"}, "context is '512'; expected a whole number"),
        ({"memory": 1.5}, "memory is 1.5; expected bytes, or text"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM(model, **settings)
    with pytest.raises(TypeError, match="model is 5; expected a name"):
        LLM(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no argument 'memry'; did you mean 'memory'"):
        LLM(model, memry="1GiB")  # type: ignore[call-arg]


def test_an_interrupt_while_sampling_leaves_every_sequence_where_it_was(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [completion.text for completion in llm.generate(["abc", "xyz"], LONG)]
    first, second = llm.stream("abc", LONG), llm.stream("xyz", LONG)
    sampled = []

    def interrupted(logits: torch.Tensor, best: list[int], sequence: Sequence) -> Sampled:
        if sampled:
            raise KeyboardInterrupt
        sampled.append(sample_rows(logits, best, sequence))
        return sampled[-1]

    monkeypatch.setattr(advance, "sample_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.engine.step()
    monkeypatch.undo()
    assert "".join(chunk.text for chunk in second) == expected[1]
    assert "".join(chunk.text for chunk in first) == expected[0]
    assert_idle(llm)


def test_each_prompt_may_be_scheduled_its_own_way(llm: LLM) -> None:
    text = "the same beginning of both of these prompts"
    salts = [Scheduling(cache_salt=salt) for salt in ("a", "b", "a")]
    found = [llm.generate([text], LONG, scheduling=[one])[0].num_cached for one in salts]
    assert found[:2] == [0, 0]
    assert found[2] > 0
    with pytest.raises(RequestError, match="2 scheduling for 1 prompts"):
        llm.generate([text], scheduling=salts[:2])
    for wrong in ("x", [3]):
        with pytest.raises(RequestError, match=r"expected Scheduling\(...\)"):
            llm.generate([text], scheduling=wrong)  # type: ignore[arg-type]


def test_progress_that_is_no_function_is_refused(llm: LLM, model: str) -> None:
    for call in (
        lambda: llm.generate("abc", progress=5),
        lambda: llm.stream("abc", progress=5),
        lambda: LLM(model, progress=5),
    ):
        with pytest.raises(RequestError, match="progress is 5; expected a function"):
            call()


def test_params_out_of_range_are_refused() -> None:
    for wrong in ((3,), 4, {"a"}):
        with pytest.raises(RequestError, match="stop"):
            SamplingParams(stop=wrong)  # type: ignore[arg-type]
    for settings in ({"n": 0}, {"logprobs": 21}):
        with pytest.raises(RequestError, match=next(iter(settings))):
            SamplingParams(**settings)  # type: ignore[arg-type]
    for settings in ({"priority": 1.5}, {"deadline_s": -1.0}, {"cache_salt": 3}):
        with pytest.raises(RequestError, match=next(iter(settings))):
            Scheduling(**settings)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="temperature is '1'; expected a number"):
        SamplingParams(temperature="1")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="expected a whole number"):
        SamplingParams(max_tokens=2.5)  # type: ignore[arg-type]


@pytest.fixture
def small_room(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> ResultsRoom:
    """Of 64 KiB for all that callers hold."""
    monkeypatch.setattr(results, "CALLER_BYTES", 64 * KIB)
    full = replace(llm.plan, pools=(replace(llm.plan.host, budget_bytes=llm.plan.peak_bytes),))
    room = ResultsRoom(full)
    monkeypatch.setattr(llm.engine, "results", room)
    return room


def test_streams_have_room_for_as_long_as_they_are_held(llm: LLM, small_room: ResultsRoom) -> None:
    left = small_room.left_bytes
    streams = [llm.stream("abc", LONG) for _ in range(3)]
    assert left - small_room.left_bytes == 3 * 16 * KIB + 2 * 40 * 3
    with pytest.raises(BusyError, match=r"answers that are held or not read yet take 16\.00 KiB"):
        llm.stream("abc", LONG)
    streams.pop()
    others = small_room.left_bytes - 17 * KIB
    assert small_room.take(others)
    with pytest.raises(BusyError, match=r"the tokens of prompts that wait take 3\.91 KiB"):
        llm.stream("x" * 100, LONG)
    small_room.release(others)
    streams.clear()
    gc.collect()
    assert small_room.left_bytes == left
    assert not llm.engine.has_work


def test_a_stream_ends_where_there_is_no_room_for_more_of_it(
    llm: LLM, small_room: ResultsRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream("abc", LONG)
    assert small_room.take(small_room.left_bytes)
    monkeypatch.setattr(Delta, "to_hold", lambda *_: (20 * KIB, ANSWERS))
    with pytest.raises(BusyError, match="answers that are held"):
        next(stream)
    assert (stream.completion.finish_reason, llm.engine.has_work) == ("error", False)


def test_prompts_whose_tokens_there_is_no_room_for_are_refused_before_all_are_made(
    llm: LLM, small_room: ResultsRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    prepare = LLM.prepare

    def noted(self: LLM, prompt: str, params: SamplingParams) -> Prompt:
        made.append(prompt)
        return prepare(self, prompt, params)

    monkeypatch.setattr(LLM, "prepare", noted)
    left = small_room.left_bytes
    with pytest.raises(BusyError, match=r"the tokens of prompts that wait take 3\.91 KiB more"):
        llm.generate(["x" * 100] * 100, LONG)
    assert len(made) == 1 + 16 + 1  # the first is within every plan; the last finds no room
    assert small_room.left_bytes == left


def test_a_stream_that_is_let_go_frees_its_blocks_at_once_begun_or_not(llm: LLM) -> None:
    for _ in range(3):
        llm.stream("never read", LONG)
    assert_idle(llm)
    stream = llm.stream("abc", LONG)
    next(stream)
    assert llm.engine.metrics.kv_blocks_used > 0
    del stream
    assert_idle(llm)
    assert llm.engine.metrics.kv_blocks_used == 0


def test_a_stream_let_go_in_another_thread_ends_after_the_step_that_runs(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("abc", LONG)[0].text
    streams = [llm.stream("xyz", LONG)]
    run = Runner.run

    def while_running(*args: Any) -> Any:
        if streams:
            thread = threading.Thread(target=streams.clear)
            thread.start()
            thread.join()  # it does not wait for the step
        return run(*args)

    monkeypatch.setattr(Runner, "run", while_running)
    assert llm.generate("abc", LONG)[0].text == expected
    assert_idle(llm)


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What finalisers raised."""
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: seen.append(one.exc_value))
    return seen


def test_a_model_that_goes_with_its_stream_goes_in_peace(
    model: str, unraisable: list[object]
) -> None:
    kept: list[object] = []
    llm = LLM(model, memory=beside(GIB), context=128, dtype="float32")
    stream = llm.stream("abc", LONG)
    next(stream)
    kept += [kept, llm, stream]
    gone = weakref.ref(llm)
    del kept, llm, stream
    gc.collect()
    assert gone() is None
    assert unraisable == []


@pytest.mark.parametrize("kind", [Request, ScoredRequest, AsyncStream])
def test_what_was_interrupted_while_it_was_made_goes_in_peace(
    kind: type, unraisable: list[object]
) -> None:
    half_made = kind.__new__(kind)
    del half_made
    gc.collect()
    assert unraisable == []


def test_next_gives_one_piece_and_for_the_rest(llm: LLM) -> None:
    stream = llm.stream("abc", LONG)
    assert isinstance(stream, Iterator)
    pieces = [next(stream).text, next(stream).text, *(chunk.text for chunk in stream)]
    assert "".join(pieces) == llm.generate("abc", LONG)[0].text
    assert next(stream, None) is None


def test_a_completion_before_the_end_is_what_there_is_so_far(llm: LLM) -> None:
    stream = llm.stream("abc", LONG)
    assert (stream.completion.text, stream.completion.token_ids) == ("", [])
    assert stream.completion.finish_reason is None
    text = next(stream).text + next(stream).text
    assert (stream.completion.text, stream.completion.finish_reason) == (text, None)
    stream.close()
    assert (stream.completion.text, stream.completion.finish_reason) == (text, "abort")
    assert_idle(llm)


@pytest.mark.parametrize("streams", [False, True])
def test_closing_the_model_ends_a_stream_that_is_under_way(
    model: str, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    if streams:
        monkeypatch.setattr(choose, "resident", lambda *args: ())
        monkeypatch.setattr(search, "with_pinned_slices", lambda case, chosen: chosen)
    llm = LLM(model, memory=beside(GIB), context=64, dtype="float32")
    assert (llm.plan.streaming is not None) == streams
    begun, fresh = llm.stream("abc", LONG), llm.stream("abc", LONG)
    next(begun)
    llm.close()
    for stream in (begun, fresh):
        with pytest.raises(RequestError, match="this model is closed"):
            list(stream)
        assert stream.completion.finish_reason == "error"


def test_threads_take_turns_and_get_what_each_gets_alone(llm: LLM) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    expected = [llm.generate(prompt, LONG)[0].text for prompt in prompts]
    with ThreadPoolExecutor(6) as threads:
        texts = threads.map(lambda prompt: llm.generate(prompt, LONG)[0].text, prompts)
        assert [*texts] == expected
    assert_idle(llm)


def test_a_panic_of_a_library_ends_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicError(BaseException):
        pass

    def panics(self: StopStringMatcher, text: str) -> str:
        raise PanicError("out of bounds")

    with monkeypatch.context() as patched:
        patched.setattr(StopStringMatcher, "push", panics)
        (bad,) = llm.generate("abc", LONG)
        assert isinstance(bad.error, RequestError)
        assert "PanicError: out of bounds" in str(bad.error)
        with pytest.raises(RequestError, match="PanicError: out of bounds"):
            list(llm.stream("abc", LONG))
    assert_idle(llm)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_interrupts_and_exits_are_nobodys_error(error: type[BaseException]) -> None:
    with pytest.raises(error), Contained():
        raise error


def test_what_a_model_advises_holds_where_the_user_says_nothing(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaid = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    greedy = llm.generate("abc", replace(unsaid, temperature=0))[0].text
    hot = replace(unsaid, temperature=1.5, top_k=3)
    by_user = llm.generate("abc", hot)[0].text
    by_default = llm.generate("abc", unsaid)[0].text
    monkeypatch.setattr(llm, "sampling", {"temperature": 0.0})
    assert llm.generate("abc", unsaid)[0].text == greedy != by_default
    assert "".join(chunk.text for chunk in llm.stream("abc", unsaid)) == greedy
    assert llm.generate("abc", hot)[0].text == by_user != greedy
    monkeypatch.setattr(llm, "sampling", {"temperature": 1.5, "top_k": 3})
    assert llm.generate("abc", unsaid)[0].text == by_user
    assert llm.generate("abc", replace(unsaid, temperature=0))[0].text == greedy
