"""AsyncStream: what comes of one prompt, from the engine's thread to who reads in an event loop."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from thinslice.engine.contained import Contained
from thinslice.engine.logprobs import Logprobs
from thinslice.engine.request import Completion, Delta, Request
from thinslice.engine.results import Held
from thinslice.engine.scored_request import ScoredRequest
from thinslice.engine.sequence import Sequence
from thinslice.errors import RequestError

AnyRequest = Request | ScoredRequest


@dataclass(eq=False)
class Feed:
    """What the engine's thread knows of a stream. It does not hold the stream itself, so that one
    that nobody holds any more is noticed.

    Attributes:
        sequences: that run for it.
        requests: that follow them, set by the engine's thread.
        unread: of each completion, what has come and nobody has read yet, as one Delta, and what
            that takes.
        news: indexes of completions that have something there, and None at the end of all.
        held: room for all that has come, and once more for what nobody has read yet.
        kept_bytes: what the sequences hold of what has come.
        come_bytes, read_bytes: what was given to be read, and of that, what was and is done with;
            the first is the engine thread's, the second the event loop's.
        lent_bytes: what a reader has who has not come back for more.
    """

    sequences: list[Sequence]
    held: Held
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    unread: dict[int, tuple[Delta, int]] = field(default_factory=dict)
    news: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)
    requests: list[AnyRequest] = field(default_factory=list)
    kept_bytes: int = 0
    come_bytes: int = 0
    read_bytes: int = 0
    lent_bytes: int = 0

    def put(self, delta: Delta, num_bytes: int) -> None:
        """Add what has come, and the room that it takes unread; in the event loop."""
        before = self.unread.get(delta.index)
        if before is None:
            self.unread[delta.index] = (delta, num_bytes)
            self.news.put_nowait(delta.index)
        else:
            self.unread[delta.index] = (before[0].followed_by(delta), before[1] + num_bytes)

    async def next(self) -> Delta | None:
        """What is unread of one completion; None where no more comes, to whoever waits."""
        self.read_bytes += self.lent_bytes
        self.lent_bytes = 0
        index = await self.news.get()
        if index is not None:
            delta, num_bytes = self.unread.pop(index)
            self.lent_bytes += num_bytes
            return delta
        self.news.put_nowait(None)
        return None

    def end(self) -> None:
        """No more comes."""
        self.news.put_nowait(None)


@dataclass(frozen=True)
class News:
    """What has come for a stream.

    Attributes:
        num_bytes: what it takes until it is read.
    """

    feed: Feed
    delta: Delta
    num_bytes: int = 0


class AsyncStream:
    """The completions of one prompt as they come: iterate for Deltas, then read ``completions``.
    Of a text that is scored one Delta comes, with its log-probabilities.

    The last Delta of each completion has a finish reason; the iteration ends after the last one's.
    What went wrong in a request is in its Delta, and not raised. Whoever leaves early calls
    ``aclose``, uses the stream as a context manager, or lets it go: that ends the completions, and
    their blocks are free before the next step. A task that is cancelled while it waits here need
    not, unless others wait too. Several tasks of the event loop that it was submitted in may
    iterate; each gets Deltas that no other gets.

    Args:
        cancel: ends what is unfinished before the next step.
        let_go: the same in a finaliser, where nobody may wait for a lock.
    """

    _num_unfinished = 0  # until it is made

    def __init__(
        self, feed: Feed, cancel: Callable[[Feed], None], let_go: Callable[[Feed], None]
    ) -> None:
        self._feed = feed
        self._cancel = cancel
        self._let_go = let_go
        self._num_unfinished = len(feed.sequences)
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
            self._cancel(self._feed)
            with Contained():  # the loop may be closed, and nobody waits in it then
                self._feed.loop.call_soon_threadsafe(self._feed.end)

    def __del__(self) -> None:
        if self._num_unfinished:
            self._let_go(self._feed)

    @property
    def sequences(self) -> list[Sequence]:
        """What runs for it; the engine's thread changes them."""
        return self._feed.sequences

    @property
    def completions(self) -> list[Completion]:
        """The whole completions, once the iteration has ended by itself."""
        return [request.completion() for request in self._feed.requests]


def failed(index: int, error: Exception) -> Delta:
    """The last Delta of a completion that something went wrong with."""
    return Delta(index, [], [], Logprobs(), finish_reason="error", error=error)


def put_all(news: list[News]) -> None:
    """Hand what has come to its streams; in their event loop."""
    for one in news:
        one.feed.put(one.delta, one.num_bytes)
