"""AsyncEngine on a tiny model: many tasks, cancellation, refusals, errors and shutdown."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.tiny_llm import write_model
from thinslice.config import SamplingParams
from thinslice.engine.async_engine import AsyncEngine, AsyncStream
from thinslice.engine.llm import LLM
from thinslice.engine.request import Delta
from thinslice.errors import BusyError, RequestError

LONG = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=24, seed=3, ignore_eos=True)
# Long enough to be still under way whenever a test looks.
ENDLESS = replace(LONG, max_tokens=None)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return LLM(str(path), memory="2GiB", context=480, dtype="float32", max_num_seqs=3)


def in_engine(
    llm: LLM, task: Callable[[AsyncEngine], Coroutine[Any, Any, None]], max_waiting: int = 64
) -> None:
    """Run a task with an open engine, and see that it leaves nothing behind."""

    async def run() -> None:
        async with AsyncEngine(llm, max_waiting) as engine:
            await task(engine)

    asyncio.run(asyncio.wait_for(run(), timeout=120))
    assert_idle(llm)


def assert_idle(llm: LLM) -> None:
    blocks = llm.engine.scheduler.blocks
    blocks.check()
    assert not llm.engine.has_work
    assert blocks.num_free == blocks.num_blocks


async def read(stream: AsyncStream) -> list[Delta]:
    return [delta async for delta in stream]


def text_of(deltas: list[Delta]) -> str:
    return "".join(chunk.text for delta in deltas for chunk in delta.chunks)


@asynccontextmanager
async def under_way(engine: AsyncEngine, prompt: str) -> AsyncIterator[AsyncStream]:
    """A stream that has brought its first token."""
    async with await engine.submit(prompt, ENDLESS) as stream:
        async for _ in stream:
            break
        yield stream


def test_many_tasks_get_what_each_prompt_gives_alone(llm: LLM) -> None:
    prompts = [f"prompt {number}" * (number + 1) for number in range(8)]
    expected = llm.generate(prompts, LONG)

    async def task(engine: AsyncEngine) -> None:
        streams = [await engine.submit(prompt, LONG) for prompt in prompts]
        results = await asyncio.gather(*(read(stream) for stream in streams))
        for deltas, stream, completion in zip(results, streams, expected, strict=True):
            assert text_of(deltas) == completion.text == stream.completions[0].text
            token_ids = [token_id for delta in deltas for token_id in delta.token_ids]
            assert token_ids == completion.token_ids
            assert [d.finish_reason for d in deltas if d.finish_reason] == ["length"]

    in_engine(llm, task)


def test_samples_come_side_by_side_with_their_logprobs(llm: LLM) -> None:
    params = replace(LONG, n=3, logprobs=2)
    expected = llm.generate("abc", params)

    async def task(engine: AsyncEngine) -> None:
        stream = await engine.submit("abc", params)
        deltas = await read(stream)
        for index, completion in enumerate(expected):
            own = [delta for delta in deltas if delta.index == index]
            assert text_of(own) == completion.text
            logprobs = [entry for delta in own for entry in delta.logprobs]
            assert tuple(logprobs) == completion.logprobs
            assert all(len(entry.top) == 2 for entry in logprobs)
        assert [c.token_ids for c in stream.completions] == [c.token_ids for c in expected]

    in_engine(llm, task)


def test_a_stream_left_early_or_cancelled_frees_its_blocks(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "abc"):
            pass
        reading = asyncio.create_task(read(await engine.submit("xyz", ENDLESS)))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        # Commands run in order: once this one is through, so are both cancellations.
        await read(await engine.submit("other", replace(LONG, max_tokens=1)))
        assert_idle(llm)

    in_engine(llm, task)


def test_more_than_may_wait_are_refused(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "a"), under_way(engine, "b"), under_way(engine, "c"):
            waiting = [await engine.submit("abc", LONG) for _ in range(2)]
            with pytest.raises(BusyError, match="2 completions wait and 1 more are asked for"):
                await engine.submit("abc", LONG)
            for stream in waiting:
                await stream.aclose()
        while engine._num_handed_over or llm.engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(BusyError, match="3 more are asked for; at most 2 may wait"):
            await engine.submit("abc", replace(LONG, n=3))
        assert text_of(await read(await engine.submit("abc", LONG)))

    in_engine(llm, task, max_waiting=2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), ("x" * 600, "at most 479 leave room"), ([], "a conversation is")],
)
def test_what_cannot_be_served_is_refused_at_once(llm: LLM, prompt: Any, message: str) -> None:
    async def task(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match=message):
            await engine.submit(prompt, LONG)

    in_engine(llm, task)


def test_a_step_that_fails_ends_what_is_under_way_and_the_engine_lives(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(scheduled: object) -> None:
        raise OSError("the disk is gone")

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "abc") as stream:
            with monkeypatch.context() as patched:
                patched.setattr(llm.engine.runner, "run", broken)
                last = (await read(stream))[-1]
            assert (last.finish_reason, str(last.error)) == ("error", "the disk is gone")
        assert text_of(await read(await engine.submit("abc", LONG))) == expected

    expected = llm.generate("abc", LONG)[0].text
    in_engine(llm, task)


def test_trouble_with_one_text_ends_it_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate("xyz", LONG)[0].text

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "abc") as stream:
            request = stream._feed.requests[0]
            monkeypatch.setattr(request, "_stops", None)
            other = await engine.submit("xyz", LONG)
            deltas, texts = await asyncio.gather(read(stream), read(other))
        assert isinstance(deltas[-1].error, AttributeError)
        assert deltas[-1].finish_reason == "error"
        assert text_of(texts) == expected

    in_engine(llm, task)


def test_shutting_down_ends_every_stream_and_refuses_new_ones(llm: LLM) -> None:
    async def run() -> None:
        engine = AsyncEngine(llm)
        engine.start()
        streams = [await engine.submit("abc", ENDLESS) for _ in range(5)]
        results = asyncio.gather(*(read(stream) for stream in streams))
        await engine.aclose()
        assert [deltas[-1].finish_reason for deltas in await results] == ["abort"] * 5
        with pytest.raises(BusyError, match="shutting down"):
            await engine.submit("abc", LONG)

    asyncio.run(run())
    assert_idle(llm)


def test_draining_lets_those_under_way_end(llm: LLM) -> None:
    expected = llm.generate("abc", LONG)[0].text

    async def run() -> None:
        engine = AsyncEngine(llm)
        engine.start()
        stream = await engine.submit("abc", LONG)
        await engine.aclose(drain_s=60.0)
        assert text_of(await read(stream)) == expected

    asyncio.run(run())
    assert_idle(llm)


def test_an_event_loop_that_went_away_takes_nobody_along(llm: LLM) -> None:
    engine = AsyncEngine(llm)
    engine.start()

    async def leave() -> None:
        await engine.submit("abc", ENDLESS)

    async def use() -> str:
        text = text_of(await read(await engine.submit("abc", LONG)))
        await engine.aclose()
        return text

    asyncio.run(leave())
    assert asyncio.run(use()) == "".join(chunk.text for chunk in llm.stream("abc", LONG))
    assert_idle(llm)
