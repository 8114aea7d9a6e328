"""Keep what goes wrong in one request from the others."""

import sys
from types import TracebackType

from thinslice.errors import RequestError, ThinsliceError

# What asks a thread or a generator to end is nobody's fault, and passes.
_PASSING = (KeyboardInterrupt, SystemExit, GeneratorExit)


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
        if error is None or isinstance(error, _PASSING) or _ends_a_task(error):
            return False
        self.error = error if isinstance(error, Exception) else _as_request_error(error)
        if isinstance(error, ThinsliceError):  # no bug; its frames would keep what the request held
            error.__traceback__ = None
        return True


def _ends_a_task(error: BaseException) -> bool:
    """Whether asyncio asks a task to end. Where it was never imported nobody does, and importing it
    takes a tenth of a short command's time."""
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and isinstance(error, asyncio.CancelledError)


def _as_request_error(error: BaseException) -> RequestError:
    kept = RequestError(f"the request could not be served: {type(error).__name__}: {error}")
    kept.__cause__ = error
    return kept
