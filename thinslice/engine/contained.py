"""Keep what goes wrong in one request from the others."""

import asyncio
from types import TracebackType

from thinslice.errors import RequestError

# What asks a thread, a task or a generator to end is nobody's fault, and passes.
_PASSING = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)


class Contained:
    """A context manager that ends at the first exception and keeps it in ``error``.

    The one place that takes any exception of a request's own (its callback, its sampling, its
    text) and goes on: whoever uses it ends that request with the error. Interrupts and exits,
    which are nobody's, pass through. Anything else that is no ``Exception``, such as the panic of a
    library that is not written in Python, is kept as a RequestError that it is the cause of.
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
        if error is None or isinstance(error, _PASSING):
            return False
        self.error = error if isinstance(error, Exception) else _as_request_error(error)
        return True


def _as_request_error(error: BaseException) -> RequestError:
    kept = RequestError(f"the request could not be served: {type(error).__name__}: {error}")
    kept.__cause__ = error
    return kept
