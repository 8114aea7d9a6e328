"""AsyncEngine: one engine for many asyncio tasks, with one thread that runs its steps.

Tasks hand requests over through a queue of bounded length and get what comes of them back through
their own event loop, woken once for each step. Whatever goes wrong, in a step or beside it, ends
those that it concerns with a last Delta; the thread goes on, or takes leave of everybody.
"""

import asyncio
import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import ParamSpec, TypeVar

from thinslice.config import SamplingParams, Scheduling
from thinslice.engine.arguments import checked_params, checked_scheduling
from thinslice.engine.async_stream import AnyRequest, AsyncStream, Feed, News, failed, put_all
from thinslice.engine.checks import TokenIds, checked_ids
from thinslice.engine.contained import Contained
from thinslice.engine.llm import LLM
from thinslice.engine.prompts import Prompt
from thinslice.engine.results import ANSWERS, Held
from thinslice.engine.scored_request import ScoredRequest
from thinslice.engine.sequence import Sequence as EngineSequence
from thinslice.engine.sequence import Status
from thinslice.engine.waiting_room import Arrival, WaitingRoom
from thinslice.errors import BusyError, RequestError, shown
from thinslice.forks import fork_safe
from thinslice.text.messages import Conversation, Message

Given = ParamSpec("Given")
Result = TypeVar("Result")
_CLOSED = "the engine is shutting down and takes no more requests"
_NOT_STARTED = "the engine is not started; use it as a context manager or call start()"


class AsyncEngine:
    """Serves many tasks from one LLM; a context manager. While it is open, nobody else uses it.

    Where the program ends and nobody has closed it, it is closed.

    Args:
        max_waiting: the most completions that may wait to be begun; more are refused.

    Attributes:
        room: what may wait.

    Errors: RequestError where the model is closed, and for what is no model and no number.
    """

    def __init__(self, llm: LLM, max_waiting: int = 256) -> None:
        if not isinstance(llm, LLM):
            raise RequestError(f"llm is {shown(llm)}; expected an LLM")
        if type(max_waiting) is not int or max_waiting < 1:
            raise RequestError(f"max_waiting is {shown(max_waiting)}; expected 1 or more")
        self.llm = llm
        self._engine = llm.engine
        self.room = WaitingRoom(llm.engine.scheduler, max_waiting, llm.plan.context)
        # Tokenizes and renders off the event loop, and one prompt at a time.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="thinslice-prepare")
        self._thread = threading.Thread(target=self._run, name="thinslice-engine", daemon=True)
        self._pid = os.getpid()
        # Those that get more Deltas; the thread's own.
        self._unfinished: list[tuple[Feed, AnyRequest]] = []

        # All that follows, and the room, is guarded by this condition's lock.
        self._changed = fork_safe(threading.Condition())
        self._commands: deque[Callable[[], None]] = deque()
        self._is_started = False
        self._is_closed = False
        self._is_stopped = False

    async def __aenter__(self) -> "AsyncEngine":
        self.start()
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        with self._changed:
            return self._is_started and not self._is_closed

    def start(self) -> None:
        """Begin to run steps.

        Errors: BusyError where it was closed, or started, before, and where no thread can be had.
        """
        self._check_process()
        with self._changed:
            if self._is_closed:
                raise BusyError(_CLOSED)
            if self._is_started:
                raise BusyError("the engine is started already")
            try:
                self._thread.start()
            except RuntimeError as error:  # nobody would run what is submitted
                raise BusyError(f"the system starts no more threads: {error}") from error
            self._is_started = True
        atexit.register(self._leave)

    async def submit(
        self,
        prompt: str | Sequence[Message] | Conversation | Prompt,
        params: SamplingParams | None = None,
        scheduling: Scheduling | None = None,
        after: AsyncStream | None = None,
    ) -> AsyncStream:
        """Queue a prompt; what comes of it is the stream's.

        Args:
            after: the scoring of the same prompt, which is waited for, as its blocks are found
                cached then. It has a place among those that wait already: one of these takes that.

        Errors: RequestError as ``LLM.generate``, and in a child of a fork; BusyError where too many
        wait, where the plan has no room for what follows the form of the answers, or where the
        engine is not started, or is shutting down.
        """
        params, scheduling = checked_params(params), checked_scheduling(scheduling)
        self._check_process()
        arrival = Arrival(scheduling.tenant, params.n if after is None else params.n - 1)
        self._check_room(arrival)
        prepared = prompt if isinstance(prompt, Prompt) else await self.prepare(prompt, params)
        sequences = self.llm.new_sequences(prepared, params, scheduling)
        if after is None:
            arrival = replace(arrival, num_tokens=len(prepared.token_ids))
        else:
            for sequence in sequences:
                sequence.leader = after.sequences[0]
        return self._hand_over(sequences, partial(self.llm.queue, prepared, sequences), arrival)

    async def score(
        self,
        token_ids: TokenIds,
        start: int = 1,
        num_top: int = 0,
        scheduling: Scheduling | None = None,
    ) -> AsyncStream:
        """Queue a text to be scored, as ``Engine.score``; it runs in the steps of completions.

        The stream has one Delta, with the reason ``scored``; the plan's room for the
        log-probabilities is taken for as long as the stream is held.
        Errors: RequestError as ``Engine.add_scored``; else as ``submit``.
        """
        ids, scheduling = checked_ids(token_ids), checked_scheduling(scheduling)
        self._check_process()
        engine, arrival = self._engine, Arrival(scheduling.tenant, 1, len(ids))
        self._check_room(arrival)
        sequence = engine.new_scored(ids, start, num_top, scheduling)

        def queued() -> list[AnyRequest]:
            engine.add([sequence])
            return [ScoredRequest(engine, sequence)]

        return self._hand_over([sequence], queued, arrival)

    async def prepare(
        self,
        prompt: str | Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
    ) -> Prompt:
        """The tokens of a prompt, made off the event loop. Errors: RequestError."""
        return await self.apart(self.llm.prepare, prompt, params)

    async def apart(
        self, work: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs
    ) -> Result:
        """What a function of texts and tokens returns, called off the event loop: one at a time."""
        called = partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._preparing, called)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those there are go on for so long, and end the rest.

        Every stream gets its last Delta: those that were ended have the reason ``abort``.
        """
        if not isinstance(drain_s, int | float) or not 0 <= drain_s <= threading.TIMEOUT_MAX:
            raise RequestError(f"drain_s is {shown(drain_s)}; expected seconds, 0 or more")
        self._close(stops=False)
        loop = asyncio.get_running_loop()
        if self._is_started:
            await loop.run_in_executor(None, self._thread.join, drain_s)
            self._close(stops=True)
            await loop.run_in_executor(None, self._thread.join)
            atexit.unregister(self._leave)
        self._preparing.shutdown()

    def _leave(self) -> None:
        """The interpreter ends: let the step that is running come to its end, and no other."""
        if self._pid == os.getpid():  # a child of a fork has no such thread
            self._close(stops=True)
            self._thread.join()

    def _close(self, stops: bool) -> None:
        with self._changed:
            self._is_closed = True
            self._is_stopped |= stops
            self._changed.notify()

    def _cancel(self, feed: Feed) -> None:
        """End a stream's completions before the next step."""
        with self._changed:
            self._let_go(feed)
            self._changed.notify()

    def _let_go(self, feed: Feed) -> None:
        """The same without a lock, for where nobody may wait: when objects are let go. The thread
        has the stream's own steps to run, or its request to add, so it need not be woken."""
        self._commands.append(partial(self._abort, feed))

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RequestError(
                f"this engine's thread runs in process {self._pid}, and not in its child; make an "
                "AsyncEngine there"
            )

    def _hand_over(
        self,
        sequences: list[EngineSequence],
        queued: Callable[[], Sequence[AnyRequest]],
        arrival: Arrival,
    ) -> AsyncStream:
        """Have the thread queue sequences.

        Errors: BusyError where too many wait, or answers that are held leave no room for these.
        """
        feed = Feed(sequences, Held(self._engine.results))
        with self._changed:
            self._check_room(arrival)
            feed.held.begin(len(sequences), ANSWERS)
            self.room.handed_over.append(arrival)
            self._commands.append(partial(self._add, feed, queued, arrival))
            self._changed.notify()
        stream = AsyncStream(feed, self._cancel, self._let_go)
        weakref.finalize(stream, feed.held.release).atexit = False
        return stream

    def _check_room(self, arrival: Arrival) -> None:
        with self._changed:
            if self._is_closed:
                raise BusyError(_CLOSED)
            if not self._is_started:  # nobody would ever answer
                raise BusyError(_NOT_STARTED)
            self.room.check(arrival)

    # The thread's side.

    def _run(self) -> None:
        try:
            while self._wait():
                self._run_commands()
                if self._unfinished:
                    self._step()
        finally:
            self._take_leave()

    def _wait(self) -> bool:
        """Wait until there is something to do; False to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._commands or self._is_closed or self._unfinished)
            return not self._is_stopped and bool(
                self._commands or self._unfinished or not self._is_closed
            )

    def _run_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _take_leave(self) -> None:
        """End what there is, take no more, and tell everybody; also where something went wrong."""
        self._close(stops=True)
        self._run_commands()
        self._end_all("abort")

    def _add(
        self, feed: Feed, queued: Callable[[], Sequence[AnyRequest]], arrival: Arrival
    ) -> None:
        with Contained() as trouble:
            feed.requests = [*queued()]
        with self._changed:
            self.room.handed_over.remove(arrival)
        self._unfinished += [(feed, request) for request in feed.requests]
        if trouble.error is not None:
            for sequence in feed.sequences:  # none was queued: nobody waits for them
                sequence.status = Status.FINISHED
            errors = (failed(index, trouble.error) for index in range(len(feed.sequences)))
            self._send([News(feed, one) for one in errors])

    def _abort(self, feed: Feed) -> None:
        self._unfinished = [one for one in self._unfinished if one[0] is not feed]
        for request in feed.requests:
            with Contained():
                self._engine.abort(request.sequence)

    def _step(self) -> None:
        with Contained() as trouble:
            self._engine.step()
        if trouble.error is None:
            self._deliver([one for one in self._unfinished if one[1].has_news])
        else:  # Nobody's fault in particular: all under way end with it, and later ones try.
            self._end_all("error", trouble.error)

    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        for feed, request in [*self._unfinished]:
            with Contained() as trouble:
                self._engine.end(request.sequence, reason, error)
            if trouble.error is not None:
                self._unfinished.remove((feed, request))
                self._send([News(feed, failed(request.index, trouble.error))])
        self._deliver(self._unfinished)

    def _deliver(self, changed: list[tuple[Feed, AnyRequest]]) -> None:
        """Give each stream what is new."""
        news: list[News] = []
        ended: set[AnyRequest] = set()
        for feed, request in changed:
            with Contained() as trouble:
                one = self._advanced(feed, request)
            if trouble.error is not None:
                one = News(feed, failed(request.index, trouble.error))
            if one.delta.finish_reason is not None:
                ended.add(request)
            news.append(one)
        self._unfinished = [one for one in self._unfinished if one[1] not in ended]
        self._send(news)

    def _advanced(self, feed: Feed, request: AnyRequest) -> News:
        """What is new of a request, which ends where there is no room for it: its sequence holds
        it, and once more what nobody has read yet."""
        delta = request.advance()
        num_bytes, what = delta.to_hold(request.sequence.params.logprobs)
        feed.kept_bytes += num_bytes
        feed.come_bytes += num_bytes
        in_use = feed.kept_bytes + feed.come_bytes - feed.read_bytes
        try:
            feed.held.have(in_use + sum(one.held_bytes for one in feed.requests), what)
        except BusyError as error:
            if delta.finish_reason is None:
                self._engine.end(request.sequence, "error", error)
                delta = replace(delta, finish_reason="error", error=error)
        return News(feed, delta, num_bytes)

    def _send(self, news: list[News]) -> None:
        """With one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[News]] = {}
        for one in news:
            by_loop.setdefault(one.feed.loop, []).append(one)
        for loop, of_loop in by_loop.items():
            with Contained() as trouble:
                loop.call_soon_threadsafe(put_all, of_loop)
            if trouble.error is not None:  # the loop is closed: nobody listens any more
                for one in of_loop:
                    self._abort(one.feed)
