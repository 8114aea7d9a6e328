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
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType

from thinslice.config import SamplingParams, Scheduling
from thinslice.constraint import Constraint
from thinslice.engine.contained import Contained
from thinslice.engine.llm import LLM, checked_params, checked_scheduling
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.prompt import Prompt
from thinslice.engine.request import Completion, Delta, Request
from thinslice.engine.results import Held
from thinslice.errors import BusyError, RequestError, shown
from thinslice.text.messages import Conversation, Message

_CLOSED = "the engine is shutting down and takes no more requests"


@dataclass(eq=False)
class _Feed:
    """What the engine's thread knows of a stream. It does not hold the stream itself, so that one
    that nobody holds any more is noticed.

    Attributes:
        requests: set by the engine's thread.
        unread: of each completion, what has come and nobody has read yet, as one Delta.
        news: indexes of completions that have something there, and None at the end of all.
        held: room for log-probabilities, the bulk of an answer that has them.
    """

    num_samples: int
    held: Held
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    unread: dict[int, Delta] = field(default_factory=dict)
    news: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    requests: list[Request] = field(default_factory=list)

    def put(self, delta: Delta) -> None:
        """Add what has come; in the event loop."""
        before = self.unread.get(delta.index)
        self.unread[delta.index] = delta if before is None else before.followed_by(delta)
        if before is None:
            self.news.put_nowait(delta.index)

    async def next(self) -> Delta | None:
        """What is unread of one completion; None where no more comes, to whoever waits."""
        index = await self.news.get()
        if index is not None:
            return self.unread.pop(index)
        self.news.put_nowait(None)
        return None

    def end(self) -> None:
        """No more comes."""
        self.news.put_nowait(None)


class AsyncStream:
    """The completions of one prompt as they come: iterate for Deltas, then read ``completions``.

    The last Delta of each completion has a finish reason; the iteration ends after the last one's.
    What went wrong in a request is in its Delta, and not raised. Whoever leaves early calls
    ``aclose``, uses the stream as a context manager, or lets it go: that ends the completions, and
    their blocks are free before the next step. A task that is cancelled while it waits here need
    not, unless others wait too. Several tasks of the event loop that it was submitted in may
    iterate; each gets Deltas that no other gets.
    """

    def __init__(self, engine: "AsyncEngine", feed: _Feed) -> None:
        self._engine = engine
        self._feed = feed
        self._num_unfinished = feed.num_samples
        self._num_waiting = 0

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Delta:
        feed = self._feed
        if asyncio.get_running_loop() is not feed.loop:
            raise RequestError("a stream is read in the event loop that it was submitted in")
        if not self._num_unfinished:
            raise StopAsyncIteration
        self._num_waiting += 1
        try:
            delta = await feed.next()
        except asyncio.CancelledError:
            if self._num_waiting == 1:
                await self.aclose()
            raise
        finally:
            self._num_waiting -= 1
        if delta is None or not self._num_unfinished:
            raise StopAsyncIteration
        self._num_unfinished -= delta.finish_reason is not None
        if not self._num_unfinished:
            feed.end()
        return delta

    async def aclose(self) -> None:
        """End what is unfinished; who waits for more of it gets no more."""
        if self._num_unfinished:
            self._num_unfinished = 0
            self._engine._cancel(self._feed)
            with Contained():  # the loop may be closed, and nobody waits in it then
                self._feed.loop.call_soon_threadsafe(self._feed.end)

    def __del__(self) -> None:
        if self._num_unfinished:
            self._engine._let_go(self._feed)

    @property
    def completions(self) -> list[Completion]:
        """The whole completions, once the iteration has ended by itself."""
        return [request.completion() for request in self._feed.requests]


class AsyncEngine:
    """Serves many tasks from one LLM; a context manager. While it is open, nobody else uses it.

    Where the program ends and nobody has closed it, it is closed.

    Args:
        max_waiting: the most completions that may wait to be begun; more are refused.

    Errors: RequestError where the model is closed, and for what is no model and no number.
    """

    def __init__(self, llm: LLM, max_waiting: int = 256) -> None:
        if not isinstance(llm, LLM):
            raise RequestError(f"llm is {shown(llm)}; expected an LLM")
        if type(max_waiting) is not int or max_waiting < 1:
            raise RequestError(f"max_waiting is {shown(max_waiting)}; expected 1 or more")
        self.llm = llm
        self.max_waiting = max_waiting
        self._engine = llm.engine
        # Tokenizes and renders off the event loop, and one prompt at a time.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="thinslice-prepare")
        self._thread = threading.Thread(target=self._run, name="thinslice-engine", daemon=True)
        self._pid = os.getpid()
        # Those that get more Deltas; the thread's own.
        self._unfinished: list[tuple[_Feed, Request]] = []

        # All that follows is guarded by this condition's lock.
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._num_handed_over = 0  # completions in commands that have not been run
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
        """Begin to run steps. Errors: BusyError where it was closed, or started, before."""
        self._check_process()
        with self._changed:
            if self._is_closed:
                raise BusyError(_CLOSED)
            if self._is_started:
                raise BusyError("the engine is started already")
            self._is_started = True
        atexit.register(self._leave)
        self._thread.start()

    async def submit(
        self,
        prompt: str | Sequence[Message] | Conversation,
        params: SamplingParams | None = None,
        scheduling: Scheduling | None = None,
    ) -> AsyncStream:
        """Queue a prompt; what comes of it is the stream's.

        Errors: RequestError as ``LLM.generate``, and in a child of a fork; BusyError where too many
        wait, or the engine is shutting down.
        """
        params, scheduling = checked_params(params), checked_scheduling(scheduling)
        self._check_process()
        self._check_room(params.n)
        prepared = await self.prepare(prompt, params.constraint)
        self._engine.check_request(prepared.token_ids, params)
        feed = _Feed(params.n, Held(self._engine.results))
        with self._changed:
            self._check_room(params.n)
            self._num_handed_over += params.n
            queued = partial(self.llm.add_requests, prepared, params, scheduling)
            self._commands.append(partial(self._add, feed, queued, params.n))
            self._changed.notify()
        stream = AsyncStream(self, feed)
        weakref.finalize(stream, feed.held.release).atexit = False
        return stream

    async def prepare(
        self,
        prompt: str | Sequence[Message] | Conversation,
        constraint: Constraint | None = None,
    ) -> Prompt:
        """``LLM.prepare``, off the event loop. Errors: as there."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self.llm.prepare, prompt, constraint)

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
        else:
            self._take_leave()
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

    def _cancel(self, feed: _Feed) -> None:
        """End a stream's completions before the next step."""
        with self._changed:
            self._let_go(feed)
            self._changed.notify()

    def _let_go(self, feed: _Feed) -> None:
        """The same without a lock, for where nobody may wait: when objects are let go. The thread
        has the stream's own steps to run, or its request to add, so it need not be woken."""
        self._commands.append(partial(self._abort, feed))

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RequestError(
                f"this engine's thread runs in process {self._pid}, and not in its child; make an "
                "AsyncEngine there"
            )

    def _check_room(self, count: int) -> None:
        with self._changed:
            if self._is_closed:
                raise BusyError(_CLOSED)
            waiting = self._num_handed_over + len(self._engine.scheduler.waiting)
            if waiting + count > self.max_waiting:
                raise BusyError(
                    f"{waiting} completions wait and {count} more are asked for; at most "
                    f"{self.max_waiting} may wait: try again later"
                )

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

    def _add(self, feed: _Feed, queued: Callable[[], list[Request]], num_samples: int) -> None:
        with Contained() as trouble:
            feed.requests = queued()
        with self._changed:
            self._num_handed_over -= num_samples
        self._unfinished += [(feed, request) for request in feed.requests]
        if trouble.error is not None:
            self._send([(feed, _failed(index, trouble.error)) for index in range(num_samples)])

    def _abort(self, feed: _Feed) -> None:
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
                self._send([(feed, _failed(request.index, trouble.error))])
        self._deliver(self._unfinished)

    def _deliver(self, changed: list[tuple[_Feed, Request]]) -> None:
        """Give each stream what is new."""
        news: list[tuple[_Feed, Delta]] = []
        ended: set[Request] = set()
        for feed, request in changed:
            with Contained() as trouble:
                delta = self._advanced(feed, request)
            if trouble.error is not None:
                delta = _failed(request.index, trouble.error)
            if delta.finish_reason is not None:
                ended.add(request)
            news.append((feed, delta))
        self._unfinished = [one for one in self._unfinished if one[1] not in ended]
        self._send(news)

    def _advanced(self, feed: _Feed, request: Request) -> Delta:
        """What is new of a request, which ends where there is no room for its log-probabilities:
        its sequence holds them, and once more what nobody has read yet."""
        delta = request.advance()
        num_top = request.sequence.params.logprobs
        if num_top is None or delta.finish_reason is not None:
            return delta
        num_bytes = 2 * Logprobs.bytes_per_token(num_top) * len(delta.token_ids)
        try:
            feed.held.use(num_bytes, "log-probabilities that are held")
        except BusyError as error:
            self._engine.end(request.sequence, "error", error)
            return replace(delta, finish_reason="error", error=error)
        return delta

    def _send(self, news: list[tuple[_Feed, Delta]]) -> None:
        """With one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Feed, Delta]]] = {}
        for feed, delta in news:
            by_loop.setdefault(feed.loop, []).append((feed, delta))
        for loop, deltas in by_loop.items():
            with Contained() as trouble:
                loop.call_soon_threadsafe(_put_all, deltas)
            if trouble.error is not None:  # the loop is closed: nobody listens any more
                for feed, _ in deltas:
                    self._abort(feed)


def _failed(index: int, error: Exception) -> Delta:
    return Delta(index, [], [], Logprobs(), finish_reason="error", error=error)


def _put_all(deltas: list[tuple[_Feed, Delta]]) -> None:
    for feed, delta in deltas:
        feed.put(delta)
