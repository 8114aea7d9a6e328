"""Stream: a completion as it comes."""

from collections import deque
from collections.abc import Callable, Generator

from thinslice.engine.request import Completion, Delta, Request, TextChunk
from thinslice.engine.results import Held
from thinslice.errors import BusyError


class Stream:
    """A completion as it comes: iterate for TextChunks, then read ``completion``.

    An iterator: ``next`` gives one piece, ``for`` all that are left. Leaving a ``for`` early ends
    the completion and frees its blocks, and so does ``close``, and letting the stream go. What goes
    wrong in the request is raised; RequestError where the model is closed meanwhile; BusyError
    where the plan has no room for more of the answer.

    Args:
        held: room for the prompt and the answer, which the stream has for as long as it is there.
    """

    def __init__(
        self, request: Request, held: Held, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._request = request
        self._held = held
        self._chunks: deque[TextChunk] = deque()
        self._progress = progress

    def __iter__(self) -> Generator[TextChunk, None, None]:
        try:
            while self._advance():
                yield self._chunks.popleft()
        finally:
            self.close()

    def __next__(self) -> TextChunk:
        if not self._advance():
            raise StopIteration
        return self._chunks.popleft()

    def close(self) -> None:
        """End the completion if it is unfinished; pieces that were not read are let go."""
        self._chunks.clear()
        self._request.engine.abort(self._request.sequence)

    @property
    def completion(self) -> Completion:
        """What there is of the completion so far, without a finish reason; all of it once the
        iteration has ended."""
        return self._request.completion()

    def _advance(self) -> bool:
        """Step until there is a piece to read; False at the end."""
        request = self._request
        while not self._chunks and not request.is_told:
            # Another stream's steps may have brought this one forward, or to its end.
            if not request.has_news:
                request.engine.step()
                self._tell_progress()
            self._chunks += self._new(request).chunks
        if not self._chunks and request.sequence.error is not None:
            raise request.sequence.error
        return bool(self._chunks)

    def _new(self, request: Request) -> Delta:
        """What is new, for which there must be room. Errors: BusyError, which ends the request."""
        delta = request.advance()
        num_bytes, what = delta.to_hold(request.sequence.params.logprobs)
        try:
            self._held.use(num_bytes, what)
        except BusyError as error:
            request.engine.end(request.sequence, "error", error)
            raise
        return delta

    def _tell_progress(self) -> None:
        """How far the prompt is, until the first token comes."""
        sequence = self._request.sequence
        if self._progress is not None and sequence.first_token_at is None:
            self._progress(sequence.num_computed, len(sequence.prompt_token_ids))
