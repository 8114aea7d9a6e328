"""AsyncEngine on a tiny model: many tasks, cancellation, refusals, errors and shutdown."""

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_llm import beside, write_model
from thinslice.config import SamplingParams
from thinslice.engine import results, waiting_room
from thinslice.engine.async_engine import AsyncEngine
from thinslice.engine.async_stream import AsyncStream
from thinslice.engine.llm import LLM
from thinslice.engine.request import Delta, Request
from thinslice.engine.results import ResultsRoom
from thinslice.errors import BusyError, RequestError
from thinslice.units import GIB, KIB

LONG = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=24, seed=3, ignore_eos=True)
# Long enough to be still under way whenever a test looks.
ENDLESS = replace(LONG, max_tokens=None)


class Panic(BaseException):
    """As a library that is not written in Python raises it."""


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_model(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return LLM(str(path), memory=beside(GIB), context=480, dtype="float32", max_num_seqs=3)


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


def test_closing_a_stream_ends_whoever_waits_for_more_of_it(llm: LLM) -> None:
    """Also where it still stands in the queue, and no Delta has come."""

    async def task(engine: AsyncEngine) -> None:
        running = [await engine.submit("abc", ENDLESS) for _ in range(3)]
        queued = await engine.submit("def", LONG)
        readers = [asyncio.create_task(read(one)) for one in (queued, queued, running[0])]
        await asyncio.sleep(0.02)
        await queued.aclose()
        await running[0].aclose()
        unread, also_unread, deltas = await asyncio.wait_for(asyncio.gather(*readers), timeout=30)
        assert [*unread, *also_unread] == []
        assert all(one.finish_reason is None for one in deltas)
        assert await read(queued) == []
        for one in running:
            await one.aclose()

    in_engine(llm, task)


def test_several_tasks_may_read_one_stream_and_all_end(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        alone = text_of(await read(await engine.submit("abc", LONG)))
        stream = await engine.submit("abc", LONG)
        parts = await asyncio.wait_for(
            asyncio.gather(*(read(stream) for _ in range(3))), timeout=30
        )
        texts = [chunk.text for part in parts for delta in part for chunk in delta.chunks]
        assert len("".join(texts)) == len(alone)
        assert stream.completions[0].text == alone

    in_engine(llm, task)


def test_what_nobody_reads_is_kept_as_one_delta(llm: LLM) -> None:
    params = replace(LONG, n=2, logprobs=2)

    async def task(engine: AsyncEngine) -> None:
        at_once = await read(await engine.submit("abc", params))
        stream = await engine.submit("abc", params)
        unread = stream._feed.unread
        while sum(one.finish_reason is not None for one, _ in unread.values()) < params.n:
            await asyncio.sleep(0.005)
        late = await read(stream)
        assert len(late) == 2
        for index in (0, 1):
            (whole,) = (one for one in late if one.index == index)
            parts = [one for one in at_once if one.index == index]
            assert text_of([whole]) == text_of(parts)
            assert len(whole.token_ids) > 4  # each of which had a Delta of its own
            assert whole.token_ids == [token for one in parts for token in one.token_ids]
            assert [*whole.logprobs] == [token for one in parts for token in one.logprobs]
            assert whole.finish_reason == parts[-1].finish_reason == "length"
            assert whole.token_ids == stream.completions[index].token_ids

    in_engine(llm, task)


def test_log_probabilities_end_where_the_plan_has_no_room_for_them(llm: LLM) -> None:
    """Of whoever comes last, and not for good: room comes back with the streams."""
    params = replace(LONG, logprobs=20, max_tokens=400)

    async def task(engine: AsyncEngine) -> None:
        streams = [await engine.submit("abc", params) for _ in range(40)]
        ends = [(await read(stream))[-1] for stream in streams]
        reasons = Counter(one.finish_reason for one in ends)
        assert min(reasons["length"], reasons["error"]) > 3
        failed = next(one for one in ends if one.finish_reason == "error")
        assert "log-probabilities that are held take" in str(failed.error)
        with pytest.raises(BusyError, match="answers that are held or not read yet take"):
            await engine.submit("abc", LONG)
        streams.clear()
        assert (await read(await engine.submit("abc", params)))[-1].finish_reason == "length"

    whole = llm.engine.results
    full = replace(llm.plan, pools=(replace(llm.plan.host, budget_bytes=llm.plan.peak_bytes),))
    llm.engine.results = ResultsRoom(full)
    in_engine(llm, task)
    llm.engine.results = whole


def test_a_reader_that_is_cancelled_leaves_the_stream_to_others(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        alone = text_of(await read(await engine.submit("abc", LONG)))
        held = [await engine.submit("def", ENDLESS) for _ in range(3)]
        stream = await engine.submit("abc", LONG)  # it waits for its turn
        readers = [asyncio.create_task(read(stream)) for _ in range(2)]
        await asyncio.sleep(0)
        readers[0].cancel()
        for one in held:
            await one.aclose()
        assert text_of(await asyncio.wait_for(readers[1], timeout=30)) == alone

    in_engine(llm, task)


def test_a_stream_is_read_in_its_own_event_loop(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        stream = await engine.submit("abc", LONG)
        with pytest.raises(RequestError, match="in the event loop that it was submitted in"):
            await asyncio.to_thread(lambda: asyncio.run(read(stream)))
        assert (await read(stream))[-1].finish_reason == "length"

    in_engine(llm, task)


def test_wrong_arguments_are_refused(llm: LLM) -> None:
    for max_waiting in (0, -1, "x", None, True, 2.5):
        with pytest.raises(RequestError, match="max_waiting is"):
            AsyncEngine(llm, max_waiting)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="llm is 'x'; expected an LLM"):
        AsyncEngine("x")  # type: ignore[arg-type]

    async def task(engine: AsyncEngine) -> None:
        for params in ({}, [], 0, "", False, {"n": 3}, "x", [LONG]):
            with pytest.raises(RequestError, match=r"expected SamplingParams\(\.\.\.\)"):
                await engine.submit("abc", params)  # type: ignore[arg-type]
        with pytest.raises(BusyError, match="started already"):
            engine.start()
        for drain_s in (float("nan"), -1.0, "x", None):
            with pytest.raises(RequestError, match="drain_s is"):
                await engine.aclose(drain_s)  # type: ignore[arg-type]

    in_engine(llm, task)


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
            assert logprobs == [*completion.logprobs]
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
        while engine.room.handed_over or llm.engine.scheduler.waiting:
            await asyncio.sleep(0.01)
        with pytest.raises(
            RequestError, match="3 completions are asked for at once; at most 2 may"
        ):
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
    def broken(*args: object) -> None:
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


def test_a_stream_that_is_let_go_frees_its_blocks_begun_or_not(llm: LLM) -> None:
    async def task(engine: AsyncEngine) -> None:
        await engine.submit("never read", ENDLESS)
        stream = await engine.submit("abc", ENDLESS)
        await anext(stream)
        del stream
        gc.collect()
        # Commands run in order: once this one is through, both are gone.
        await read(await engine.submit("other", replace(LONG, max_tokens=1)))
        assert_idle(llm)

    in_engine(llm, task)


def test_streams_of_somebody_else_do_not_end_the_thread(llm: LLM) -> None:
    expected = llm.generate("abc", LONG)[0].text
    foreign = llm.stream("somebody else's", LONG)

    async def task(engine: AsyncEngine) -> None:
        assert text_of(await read(await engine.submit("abc", LONG))) == expected
        assert text_of(await read(await engine.submit("abc", LONG))) == expected
        foreign.close()

    in_engine(llm, task)


@pytest.mark.parametrize("name", ["queue", "engine.add", "engine.scheduler.add"])
@pytest.mark.parametrize("error", [MemoryError, Panic])
def test_a_request_that_cannot_be_added_hears_of_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error("planted")

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "xyz") as other:
            with monkeypatch.context() as patched:
                *path, last = name.split(".")
                patched.setattr(reduce(getattr, path, llm), last, fails)
                deltas = await read(await engine.submit("abc", replace(LONG, n=2)))
            assert [delta.finish_reason for delta in deltas] == ["error", "error"]
            assert all("planted" in str(delta.error) for delta in deltas)
            assert text_of(await read(await engine.submit("abc", LONG))) == expected
            assert (await anext(other)).finish_reason is None

    expected = llm.generate("abc", LONG)[0].text
    in_engine(llm, task)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_tells_those_who_wait_and_refuses_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that ends it."""

    def ends(self: AsyncEngine) -> None:
        raise SystemExit

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "abc") as stream:
            with monkeypatch.context() as patched:
                patched.setattr(AsyncEngine, "_step", ends)
                assert (await read(stream))[-1].finish_reason == "abort"
            with pytest.raises(BusyError, match="shutting down"):
                await engine.submit("abc", LONG)

    in_engine(llm, task)


def test_closing_the_model_ends_streams_and_refuses_requests(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    llm = LLM(str(path), memory=beside(GIB), context=480, dtype="float32", max_num_seqs=3)

    async def run() -> None:
        async with AsyncEngine(llm) as engine:
            streams = [await engine.submit("abc", ENDLESS) for _ in range(5)]
            await anext(streams[0])
            llm.close()
            for stream in streams:
                last = (await read(stream))[-1]
                assert last.finish_reason == "error"
                assert "this model is closed" in str(last.error)
            with pytest.raises(RequestError, match="this model is closed"):
                await engine.submit("abc", LONG)

    asyncio.run(asyncio.wait_for(run(), timeout=120))
    with pytest.raises(RequestError, match="this model is closed"):
        AsyncEngine(llm)


def test_what_was_never_started_takes_no_requests(llm: LLM) -> None:
    async def run() -> None:
        engine = AsyncEngine(llm)
        for ask in (lambda: engine.submit("abc", LONG), lambda: engine.score([1, 2, 3])):
            with pytest.raises(BusyError, match=r"not started; use it .* or call start\(\)"):
                await ask()
        engine.start()
        assert text_of(await read(await engine.submit("abc", LONG)))
        await engine.aclose()

    asyncio.run(asyncio.wait_for(run(), timeout=120))
    assert_idle(llm)


def test_closing_what_was_never_started_or_is_closed_is_no_error(llm: LLM) -> None:
    async def run() -> None:
        engine = AsyncEngine(llm)
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(BusyError, match="shutting down"):
            engine.start()

    asyncio.run(asyncio.wait_for(run(), timeout=120))
    assert_idle(llm)


def test_what_is_wrong_in_a_score_ends_nobody_elses_request(llm: LLM) -> None:
    expected = llm.generate("abc", LONG)[0].text

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "xyz"):
            stream = await engine.submit("abc", LONG)
            for wrong in ({"num_top": True}, {"num_top": 1.5}, {"start": 1.5}, {"start": None}):
                with pytest.raises(RequestError, match="expected an int"):
                    await engine.score([1, 2, 3, 4], **wrong)  # type: ignore[arg-type]
            for ids in (None, 5, "ab", [1.5, 2], [[1, 2]]):
                with pytest.raises(RequestError, match=r"^token ids are"):
                    await engine.score(ids)  # type: ignore[arg-type]
            assert text_of(await read(stream)) == expected

    in_engine(llm, task)


def test_texts_are_scored_beside_completions(llm: LLM) -> None:
    expected = llm.engine.score([*b"abcdefgh"], 3, 2)
    text = llm.generate("xyz", LONG)[0].text

    async def task(engine: AsyncEngine) -> None:
        writing = asyncio.create_task(read(await engine.submit("xyz", LONG)))
        streams = [await engine.score([*b"abcdefgh"], 3, 2) for _ in range(5)]
        for stream in streams:
            deltas = await read(stream)
            assert [delta.finish_reason for delta in deltas] == ["scored"]
            assert deltas[0].logprobs == expected == stream.completions[0].logprobs
        assert text_of(await writing) == text

    in_engine(llm, task)


def test_scores_that_nobody_waits_for_end(llm: LLM) -> None:
    gc.collect()
    left = llm.engine.results.left_bytes

    async def task(engine: AsyncEngine) -> None:
        async with under_way(engine, "a"), under_way(engine, "b"), under_way(engine, "c"):
            streams = [await engine.score([5] * 400) for _ in range(2)]
            with pytest.raises(BusyError, match="2 completions wait and 1 more are asked for"):
                await engine.score([5] * 400)
            reading = asyncio.create_task(read(streams[0]))
            await asyncio.sleep(0.01)
            reading.cancel()
            del streams, reading
            gc.collect()
            while engine.room.handed_over or llm.engine.scheduler.waiting:
                await asyncio.sleep(0.01)
        assert llm.engine.results.left_bytes >= left

    in_engine(llm, task, max_waiting=2)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (([1],), "start is 1 for a text of 1 tokens"),
        (([1] * 481,), "the context is 480"),
        (([1, 2], 2), "start is 2"),
        (([1, 999],), "outside the vocabulary"),
        (([1, 2], 1, 21), "num_top is 21"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(llm: LLM, asked: Any, message: str) -> None:
    async def task(engine: AsyncEngine) -> None:
        with pytest.raises(RequestError, match=message):
            await engine.score(*asked)

    in_engine(llm, task)


def test_a_step_that_fails_ends_scores_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError("the disk is gone")

    async def task(engine: AsyncEngine) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(llm.engine.runner, "run", broken)
            (last,) = await read(await engine.score([*b"abc"]))
        assert (last.finish_reason, str(last.error)) == ("error", "the disk is gone")
        (last,) = await read(await engine.score([*b"abc"]))
        assert len(last.logprobs) == 2

    in_engine(llm, task)


def test_prompts_that_wait_are_bounded_by_their_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting_room, "_TOKENS", 0)
    monkeypatch.setattr(waiting_room, "_CONTEXTS", 1)

    async def task(engine: AsyncEngine) -> None:
        assert engine.room.max_tokens == 480
        async with under_way(engine, "a"), under_way(engine, "b"), under_way(engine, "c"):
            waiting = [
                await engine.submit("x" * 200, replace(LONG, n=3)),
                await engine.score([5] * 280),
            ]
            told = "480 tokens wait and 1 more are asked for; at most 480 may wait"
            for _ in range(2):  # while they are handed over, and once they wait
                with pytest.raises(BusyError, match=told):
                    await engine.submit("x", LONG)
                with pytest.raises(BusyError, match="480 tokens wait and 2 more"):
                    await engine.score([5] * 2)
                while engine.room.handed_over:
                    await asyncio.sleep(0.01)
            for stream in waiting:
                await stream.aclose()
            while llm.engine.scheduler.waiting:
                await asyncio.sleep(0.01)
            await (await engine.submit("x" * 400, LONG)).aclose()

    in_engine(llm, task)


def test_an_engine_that_gets_no_thread_is_not_open(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        engine = AsyncEngine(llm)
        monkeypatch.setattr(engine._thread, "start", refused)
        with pytest.raises(BusyError, match="the system starts no more threads: can't start"):
            engine.start()
        assert not engine.is_open
        with pytest.raises(BusyError, match="not started"):
            await engine.submit("a", LONG)
        await engine.aclose()

    asyncio.run(run())


def test_text_that_is_held_back_counts_while_it_is(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def task(engine: AsyncEngine) -> None:
        left = llm.engine.results.left_bytes
        stream = await engine.submit("abc", replace(LONG, max_tokens=8))
        *_, last = await read(stream)
        assert last.finish_reason == "length"
        assert left - llm.engine.results.left_bytes >= 100 * KIB
        monkeypatch.setattr(Request, "held_bytes", left + KIB)
        *_, last = await read(await engine.submit("abc", LONG))
        assert isinstance(last.error, BusyError)

    monkeypatch.setattr(Request, "held_bytes", 100 * KIB)
    in_engine(llm, task)


def test_answers_that_nobody_reads_end_where_the_plan_has_no_room(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room comes back as they are read, and all of it once they are let go."""
    params = replace(LONG, max_tokens=400)

    async def task(engine: AsyncEngine) -> None:
        left = llm.engine.results.left_bytes
        streams = [await engine.submit("abc", params) for _ in range(8)]
        unread = [stream._feed.unread for stream in streams]
        while not all(one and one[0][0].finish_reason for one in unread):
            await asyncio.sleep(0.005)
        with pytest.raises(BusyError, match="answers that are held or not read yet take"):
            await engine.submit("x", LONG)
        ends = [(await read(stream))[-1] for stream in streams]
        assert {one.finish_reason for one in ends} == {"length", "error"}
        told = next(str(one.error) for one in ends if one.error is not None)
        assert "answers that are held or not read yet take" in told
        streams.clear()
        gc.collect()
        stream = await engine.submit("abc", params)
        assert len(await read(stream)) > 1
        held = left - llm.engine.results.left_bytes
        assert held < 16 * KIB + 60 * 400 + 16 * KIB  # unread no more, and still there
        del stream
        gc.collect()
        assert llm.engine.results.left_bytes == left

    monkeypatch.setattr(results, "CALLER_BYTES", 250 * KIB)
    full = replace(llm.plan, pools=(replace(llm.plan.host, budget_bytes=llm.plan.peak_bytes),))
    monkeypatch.setattr(llm.engine, "results", ResultsRoom(full))
    in_engine(llm, task)
