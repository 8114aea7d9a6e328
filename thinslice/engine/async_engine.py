"""AsyncEngine: one engine for many asyncio tasks, with one thread that runs its steps.

Tasks hand requests over through a queue of bounded length and get what comes of them back through
their own event loop, woken once for each step. The engine itself is touched by its thread alone.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType

from thinslice.config import SamplingParams
from thinslice.engine.contained import Contained
from thinslice.engine.llm import LLM, Message, Prompt
from thinslice.engine.request import Completion, Delta, Request
from thinslice.errors import BusyError

_CLOSED = "the engine is shutting down and takes no more requests"


class AsyncStream:
    """The completions of one prompt as they come: iterate for Deltas, then read ``completions``.

    The last Delta of each completion has a finish reason; the iteration ends after the last one's.
    What went wrong in a request is in its Delta, and not raised. Whoever leaves early calls
    ``aclose``, or uses the stream as a context manager: that ends the completions, and their
    blocks are free before the next step. A task that is cancelled while it waits here need not.
    """

    def __init__(self, engine: "AsyncEngine", num_samples: int) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._num_unfinished = num_samples
        self._requests: list[Request] = []  # the engine's thread sets them

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
        if not self._num_unfinished:
            raise StopAsyncIteration
        try:
            delta = await self._deltas.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._num_unfinished -= delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """End what is unfinished."""
        if self._num_unfinished:
            self._num_unfinished = 0
            self._engine.cancel(self)

    @property
    def completions(self) -> list[Completion]:
        """The whole completions, once the iteration has ended by itself."""
        return [request.completion() for request in self._requests]


class AsyncEngine:
    """Serves many tasks from one LLM; a context manager. While it is open, nobody else uses it.

    Args:
        max_waiting: the most completions that may wait to be begun; more are refused.
    """

    def __init__(self, llm: LLM, max_waiting: int = 256) -> None:
        self.llm = llm
        self.max_waiting = max_waiting
        # Tokenizes and renders off the event loop, and one prompt at a time.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="thinslice-prepare")
        self._thread = threading.Thread(target=self._run, name="thinslice-engine", daemon=True)
        self._streams: dict[int, tuple[AsyncStream, Request]] = {}  # by sequence; the thread's own

        # All that follows is guarded by this condition's lock.
        self._changed = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._num_handed_over = 0  # completions in commands that have not been run
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

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    async def submit(
        self, prompt: str | Sequence[Message], params: SamplingParams | None = None
    ) -> AsyncStream:
        """Queue a prompt; what comes of it is the stream's.

        Errors: RequestError as ``LLM.generate``; BusyError where too many wait, or the engine is
        shutting down.
        """
        params = params or SamplingParams()
        self._check_room(params.n)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._preparing, self.llm.prepare, prompt)
        self.llm.engine.check_request(prepared.token_ids, params)
        stream = AsyncStream(self, params.n)
        with self._changed:
            self._check_room(params.n)
            self._num_handed_over += params.n
            self._commands.append(partial(self._add, stream, prepared, params))
            self._changed.notify()
        return stream

    def cancel(self, stream: AsyncStream) -> None:
        """End a stream's completions before the next step."""
        with self._changed:
            self._commands.append(partial(self._abort, stream))
            self._changed.notify()

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those there are go on for so long, and end the rest.

        Every stream gets its last Delta: those that were ended have the reason ``abort``.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._thread.join, drain_s)
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        await loop.run_in_executor(None, self._thread.join)
        self._preparing.shutdown()

    def _check_room(self, count: int) -> None:
        with self._changed:
            if self._is_closed:
                raise BusyError(_CLOSED)
            waiting = self._num_handed_over + len(self.llm.engine.scheduler.waiting)
            if waiting + count > self.max_waiting:
                raise BusyError(
                    f"{waiting} completions wait and {count} more are asked for; at most "
                    f"{self.max_waiting} may wait: try again later"
                )

    # The thread's side.

    def _run(self) -> None:
        try:
            while self._take_commands():
                if self.llm.engine.has_work:
                    self._step()
        finally:
            for _, request in self._streams.values():
                self.llm.engine.abort(request.sequence)
            self._deliver(list(self._streams.values()))

    def _take_commands(self) -> bool:
        """Run what tasks have asked for, waiting for it where there is no work; False to end."""
        engine = self.llm.engine
        with self._changed:
            self._changed.wait_for(
                lambda: self._commands or self._is_closed or self._is_stopped or engine.has_work
            )
            while self._commands:
                self._commands.popleft()()
            return not self._is_stopped and (engine.has_work or not self._is_closed)

    def _add(self, stream: AsyncStream, prompt: Prompt, params: SamplingParams) -> None:
        self._num_handed_over -= params.n
        stream._requests = self.llm.add_requests(prompt, params)
        for request in stream._requests:
            self._streams[request.sequence.seq_id] = (stream, request)

    def _abort(self, stream: AsyncStream) -> None:
        for request in stream._requests:
            self.llm.engine.abort(request.sequence)
            self._streams.pop(request.sequence.seq_id, None)

    def _step(self) -> None:
        engine = self.llm.engine
        with Contained() as trouble:
            outputs = engine.step()
        if trouble.error is None:
            self._deliver([self._streams[output.sequence.seq_id] for output in outputs])
            return
        # Nobody's fault in particular: all that were under way end with it, and later ones try.
        for _, request in self._streams.values():
            engine.fail(request.sequence, trouble.error)
        self._deliver(list(self._streams.values()))

    def _deliver(self, changed: list[tuple[AsyncStream, Request]]) -> None:
        """Give each stream what is new, with one call into each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[AsyncStream, Delta]]] = {}
        for stream, request in changed:
            delta = request.advance()
            if request.is_finished:
                del self._streams[request.sequence.seq_id]
            by_loop.setdefault(stream._loop, []).append((stream, delta))
        for loop, deltas in by_loop.items():
            with Contained() as trouble:
                loop.call_soon_threadsafe(_put_all, deltas)
            if trouble.error is not None:  # the loop is closed: nobody listens any more
                for stream, _ in deltas:
                    self._abort(stream)


def _put_all(deltas: list[tuple[AsyncStream, Delta]]) -> None:
    for stream, delta in deltas:
        stream._deltas.put_nowait(delta)
