"""Keep what goes wrong in one request from the others."""

from types import TracebackType


class Contained:
    """A context manager that ends at the first exception and keeps it in ``error``.

    The one place that takes any exception of a request's own (its callback, its sampling, its
    text) and goes on: whoever uses it ends that request with the error. Interrupts and exits,
    which are nobody's, pass through.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> "Contained":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is not None
