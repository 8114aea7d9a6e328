"""/v1/completions as evaluation harnesses use it: lists of prompts, echoes and their scores."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncGenerator
from operator import itemgetter
from typing import Any

import httpx2
import openai
import pytest

from tests.asking import ask, post, server_fixture, slow_steps
from tests.servers import NAME, Running
from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.engine import Engine
from thinslice.engine.grammar import Grammar
from thinslice.engine.results import BYTES_TO_BEGIN, ResultsRoom
from thinslice.engine.sequence import Sequence
from thinslice.serve import lazy_json, prompt_work
from thinslice.serve.answers import all_of, merged
from thinslice.serve.prompt_work import Asked, AskedPrompt, PromptWork
from thinslice.serve.settings import ServerSettings

TEXTS = ["the moon", "a path thither", "äöü€ 中文", "x"]
GREEDY: Any = {"model": NAME, "temperature": 0, "max_tokens": 6}


server = server_fixture(ServerSettings(drain_s=0.0, max_waiting=8))


def complete(server: Running, **body: Any) -> httpx2.Response:
    return post(server, "/v1/completions", {**GREEDY, **body})


def answer(server: Running, **body: Any) -> Any:
    found = complete(server, **body)
    assert found.status_code == 200, found.text
    return found.json()


def streamed(server: Running, **body: Any) -> list[Any]:
    """The choices of a stream, the pieces of each put together."""
    *events, done = complete(server, **body, stream=True).text.strip().split("\n\n")
    assert done == "data: [DONE]"
    whole: dict[int, Any] = {}
    for event in events:
        for piece in json.loads(event.removeprefix("data: "))["choices"]:
            before = whole.get(piece["index"])
            whole[piece["index"]] = piece if before is None else joined(before, piece)
    return [whole[index] for index in sorted(whole)]


def joined(before: Any, piece: Any) -> Any:
    assert before["finish_reason"] is None, "nothing follows the last piece"
    logprobs = piece["logprobs"]
    if logprobs is not None:
        logprobs = {name: before["logprobs"][name] + logprobs[name] for name in logprobs}
    return {**piece, "text": before["text"] + piece["text"], "logprobs": logprobs}


def ids_of(server: Running, text: str) -> list[int]:
    return server.served.engine.llm.prepare(text).token_ids


def test_prompts_come_back_in_their_order_as_each_alone(server: Running) -> None:
    alone = [answer(server, prompt=text) for text in TEXTS]
    for prompts in (TEXTS, [ids_of(server, text) for text in TEXTS]):
        found = answer(server, prompt=prompts)
        assert [one["index"] for one in found["choices"]] == [0, 1, 2, 3]
        expected = [one["choices"][0]["text"] for one in alone]
        assert [one["text"] for one in found["choices"]] == expected
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert found["usage"][name] == sum(one["usage"][name] for one in alone)
        assert streamed(server, prompt=prompts) == found["choices"]


def test_choices_of_a_prompt_stand_together(server: Running) -> None:
    asked = {"prompt": TEXTS[:2], "n": 3, "temperature": 1.0, "seed": 5}
    found = answer(server, **asked)
    assert [one["index"] for one in found["choices"]] == [*range(6)]
    for place, text in enumerate(TEXTS[:2]):
        alone = answer(server, **{**asked, "prompt": text})["choices"]
        own = found["choices"][3 * place : 3 * place + 3]
        assert [one["text"] for one in own] == [one["text"] for one in alone]


def test_one_list_of_ids_is_one_prompt(server: Running) -> None:
    found = answer(server, prompt=ids_of(server, "the moon"))["choices"]
    assert [one["text"] for one in found] == [
        answer(server, prompt="the moon")["choices"][0]["text"]
    ]


def test_an_evaluation_harness_reads_what_it_asks_for(server: Running) -> None:
    """As local-completions of lm-evaluation-harness 0.4.13 asks, and as it reads the answer."""
    context, rest = ids_of(server, "the moon is"), ids_of(server, " a path")
    inputs = [context + rest, context + rest[:2]]
    asked = {"prompt": inputs, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    found = answer(server, **asked, echo=True)
    engine = server.served.engine.llm.engine
    for choice, tokens in zip(
        sorted(found["choices"], key=itemgetter("index")), inputs, strict=True
    ):
        told = choice["logprobs"]
        own = told["token_logprobs"][len(context) : -1]
        tops = told["top_logprobs"][len(context) : -1]
        expected = engine.score(tokens, len(context), 1)
        assert own == [one.logprob for one in expected]
        is_greedy = [one == max(top.values()) for one, top in zip(own, tops, strict=True)]
        assert is_greedy == [one.logprob == one.top[0][1] for one in expected]


def test_a_harness_sees_that_a_greedy_continuation_is_one(server: Running) -> None:
    prompt = ids_of(server, "the moon")
    continued = server.served.engine.llm.engine.score
    greedy = list(prompt)
    for _ in range(4):  # each time the likeliest
        greedy.append(continued([*greedy, 0], len(greedy), 1)[0].top[0][0])
    told = answer(server, prompt=greedy, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    tops = told["logprobs"]["top_logprobs"][len(prompt) : -1]
    own = told["logprobs"]["token_logprobs"][len(prompt) : -1]
    assert own == [max(top.values()) for top in tops]


@pytest.mark.parametrize("is_text", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_an_echo_has_its_prompt_scored_and_offsets_into_its_text(
    server: Running, text: str, is_text: bool
) -> None:
    tokenizer = server.served.engine.llm.tokenizer
    ids = ids_of(server, text)
    asked = {"prompt": text if is_text else ids, "echo": True, "logprobs": 2}
    found = answer(server, **asked)["choices"]
    assert streamed(server, **asked) == found
    told = found[0]["logprobs"]
    assert found[0]["text"].startswith(text)
    alone = answer(server, **{**asked, "echo": False})["choices"][0]
    assert found[0]["text"] == text + alone["text"]
    expected = [tokenizer.token_bytes(one).decode(errors="replace") for one in ids]
    assert told["tokens"] == expected + alone["logprobs"]["tokens"]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    scores = server.served.engine.llm.engine.score(ids, 1, 2) if len(ids) > 1 else []
    assert told["token_logprobs"][1 : len(ids)] == [one.logprob for one in scores]
    assert told["token_logprobs"][len(ids) :] == alone["logprobs"]["token_logprobs"]
    for name, top, own in zip(
        told["tokens"][1:], told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True
    ):
        assert top[name] >= own  # another token may have the same text
        assert 2 <= len(top) <= 3 or "\ufffd" in top
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert found[0]["text"][offset:].startswith(token)
    assert told["text_offset"] == sorted(told["text_offset"])
    # A character of several tokens begins where its first one does.
    if text.startswith("äöü€"):
        assert told["text_offset"][:10] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4]


def test_a_prompt_is_scored_without_a_token_more(server: Running) -> None:
    before = server.served.engine.llm.engine.metrics.completion_tokens
    asked = {"prompt": TEXTS, "echo": True, "logprobs": 0, "max_tokens": 0}
    found = answer(server, **asked)
    assert [one["text"] for one in found["choices"]] == TEXTS
    assert [one["finish_reason"] for one in found["choices"]] == ["length"] * 4
    assert found["usage"]["completion_tokens"] == 0
    assert found["usage"]["prompt_tokens"] == sum(len(ids_of(server, one)) for one in TEXTS)
    for choice, text in zip(found["choices"], TEXTS, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(ids_of(server, text))
    assert streamed(server, **asked) == found["choices"]
    assert server.served.engine.llm.engine.metrics.completion_tokens == before
    assert answer(server, prompt="the", echo=True, max_tokens=0)["choices"][0]["text"] == "the"


def test_a_text_as_long_as_the_context_is_scored(server: Running) -> None:
    asked = {"prompt": [5] * 512, "echo": True, "logprobs": 0, "max_tokens": 0}
    assert len(answer(server, **asked)["choices"][0]["logprobs"]["tokens"]) == 512
    answered = complete(server, **{**asked, "prompt": [5] * 513})
    assert answered.json()["error"]["code"] == "context_length_exceeded"


def test_the_library_reads_an_echo(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        found = client.completions.create(prompt=TEXTS, echo=True, logprobs=1, **GREEDY)
    assert [one.index for one in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text.startswith("the moon")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1 << 70]}, None),
        ({"prompt": [99999]}, None),
        ({"prompt": [99999], "echo": True, "logprobs": 1}, None),
        ({"prompt": ["a", ""]}, None),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 3, "n": 3}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_completed_is_refused(
    server: Running, change: dict[str, Any], param: str | None
) -> None:
    found = complete(server, **{"prompt": "a", **change})
    assert found.status_code == 400, found.text
    assert param is None or found.json()["error"]["param"].startswith(param)
    server.wait_until_idle()


def test_scores_that_the_plan_has_no_room_for_are_refused(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = ResultsRoom.take

    def for_completions_alone(room: ResultsRoom, num_bytes: int) -> bool:
        return num_bytes == BYTES_TO_BEGIN and take(room, num_bytes)

    monkeypatch.setattr(ResultsRoom, "take", for_completions_alone)
    found = complete(server, prompt=["abc", "def"], echo=True, logprobs=20, max_tokens=0)
    assert found.status_code == 429
    assert "log-probabilities take" in found.json()["error"]["message"]
    monkeypatch.undo()
    answer(server, prompt=["abc", "def"], echo=True, logprobs=20, max_tokens=0)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_completions_behind_an_echo_have_their_place_from_the_start(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """What the plan has no room for is refused before the echo comes, and nothing runs on."""
    asked = {"prompt": "abc", "n": 2, "echo": True, "logprobs": 0, "stream": is_streamed}
    assert complete(server, **asked).status_code == 200
    take = ResultsRoom.take

    def for_one_completion(room: ResultsRoom, num_bytes: int) -> bool:
        return num_bytes != 2 * BYTES_TO_BEGIN and take(room, num_bytes)

    monkeypatch.setattr(ResultsRoom, "take", for_one_completion)
    found = complete(server, **asked)
    assert found.status_code == 429, found.text
    assert found.headers["retry-after"] == "1"
    server.wait_until_idle()
    monkeypatch.undo()
    assert complete(server, **asked).status_code == 200


def test_as_many_as_may_wait_are_scored_and_completed_at_once(server: Running) -> None:
    asked = {"prompt": [[7, 8, number] for number in range(8)], "echo": True, "logprobs": 0}
    found = answer(server, **asked)
    assert len(found["choices"]) == 8
    assert complete(server, **{**asked, "n": 2}).status_code == 400
    assert [one["text"] for one in streamed(server, **asked)] == [
        one["text"] for one in found["choices"]
    ]


def test_room_for_scores_is_given_back(server: Running) -> None:
    room = server.served.engine.llm.engine.results
    gc.collect()
    left = room.left_bytes
    for is_streamed in (False, True):
        complete(server, prompt=TEXTS, echo=True, logprobs=20, stream=is_streamed)
        until = time.monotonic() + 20
        while room.left_bytes != left:  # once the server is through with the request
            assert time.monotonic() < until
            time.sleep(0.005)


def test_who_goes_away_leaves_nothing_that_is_scored(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = slow_steps(monkeypatch)
    asked = {"prompt": [[7] * 500] * 8, "max_tokens": 0, "logprobs": 0, "echo": True}
    with ask(server, {**GREEDY, **asked}):
        while not began:
            pass
    server.wait_until_idle()
    assert len(began) < 20  # of more than sixty


def test_an_error_of_one_prompt_ends_the_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Engine.add

    def failing(self: Engine, sequences: list[Sequence], *more: Any) -> None:
        if sequences[0].prompt_token_ids[0] == 66:
            raise MemoryError
        add(self, sequences, *more)

    monkeypatch.setattr(Engine, "add", failing)
    asked = {"prompt": [[7] * 500, [66, 66]], "echo": True, "logprobs": 0}
    assert complete(server, **asked).status_code == 503
    assert complete(server, **asked, stream=True).text.count('"error"') == 1
    server.wait_until_idle()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_completions_end_where_their_scoring_goes_wrong(
    server: Running, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """Whoever still holds them."""

    async def wrong(stream: AsyncStream) -> None:
        raise MemoryError

    async def run() -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        prompt = await engine.prepare("the moon", params)
        asked = Asked(params, Scheduling(), 0, is_echoed=True, is_completed=True)
        work = PromptWork(engine, 0, asked, AskedPrompt(prompt, "the moon", 0))
        await work.begin()
        with pytest.raises(MemoryError):
            await (anext(work.pieces()) if is_streamed else work.run())
        assert work._stream is not None
        until = time.monotonic() + 20
        while any(one.finish_reason is None for one in work._stream.sequences):
            assert time.monotonic() < until
            await asyncio.sleep(0.005)
        assert [one.finish_reason for one in work._stream.sequences] == ["abort"]

    engine = server.served.engine
    monkeypatch.setattr(prompt_work, "whole", wrong)
    asyncio.run(run())


def test_long_answers_are_written_piece_by_piece(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": "the moon", "logprobs": 3, "echo": True}
    whole = complete(server, **asked)
    monkeypatch.setattr(lazy_json, "_PIECE", 100)
    pieces = complete(server, **asked)
    assert "content-length" in whole.headers
    assert "content-length" not in pieces.headers
    assert pieces.json()["choices"] == whole.json()["choices"]


def test_works_that_fail_take_the_others_along() -> None:
    ended = []

    async def endless(name: str) -> AsyncGenerator[str]:
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            ended.append(name)

    async def failing() -> AsyncGenerator[str]:
        yield "b"
        raise ValueError("b")

    async def run() -> None:
        with pytest.raises(ValueError, match="b"):
            async for _ in merged([endless("a"), failing()]):
                pass
        assert ended == ["a"]
        waiting = asyncio.Event()
        with pytest.raises(ValueError, match="c"):
            await all_of([waiting.wait(), wrong()])

    async def wrong() -> bool:
        raise ValueError("c")

    asyncio.run(run())


def test_merged_gives_all_of_each_in_its_order() -> None:
    async def counting(first: int, count: int) -> AsyncGenerator[int]:
        for number in range(first, first + count):
            yield number
            await asyncio.sleep(0)

    async def run() -> list[int]:
        sources = [counting(0, 5), counting(10, 0), counting(20, 3)]
        return [one async for one in merged(sources)]

    found = asyncio.run(run())
    assert sorted(found) == [0, 1, 2, 3, 4, 20, 21, 22]
    assert [one for one in found if one < 10] == [0, 1, 2, 3, 4]


def test_without_max_tokens_there_are_sixteen_as_at_openai(server: Running) -> None:
    for more in ({}, {"max_tokens": None}):
        body = {"model": NAME, "prompt": "the moon", "ignore_eos": True, **more}
        found = post(server, "/v1/completions", body).json()
        assert found["usage"]["completion_tokens"] == 16


def test_a_form_for_more_completions_than_ever_fit_is_refused_for_good(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": ["a", "b", "c"], "structured_outputs": {"choice": ["yes", "no"]}, "n": 2}
    assert complete(server, **asked).status_code == 200
    checked: list[int] = []
    monkeypatch.setattr(Grammar, "check_count", lambda _, count: checked.append(count))
    assert complete(server, **asked).status_code == 200
    assert max(checked) == 6
    monkeypatch.undo()
    monkeypatch.setattr(ResultsRoom, "most_bytes", 0)
    refused = complete(server, **asked)
    assert refused.status_code == 400
    assert "at most 0 fit" in refused.text


def test_who_waits_for_a_scoring_that_could_not_be_queued_goes_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The public stream of one, whose follower is not let go with it."""
    engine, add, ids = server.served.engine, Engine.add, [*range(5, 25)]

    def failing(self: Engine, sequences: list[Sequence], *more: Any) -> None:
        if sequences[0].scored is not None:
            raise MemoryError
        add(self, sequences, *more)

    async def both() -> list[Any]:
        scored = await engine.score(ids)
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        prompt = engine.llm.prepare_tokens(ids, params)
        stream = await engine.submit(prompt, params, after=scored)
        return [one.finish_reason async for one in stream]

    monkeypatch.setattr(Engine, "add", failing)
    assert asyncio.run(both())[-1] == "length"
