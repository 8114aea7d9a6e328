"""What the tokenizers library raises, as thinslice's own errors.

It is written in Rust. Where it panics, what arrives in Python is no Exception but a BaseException
of a class that cannot be imported; its other errors are plain Exceptions. What it is given may also
not fit its own types: text with half of a surrogate pair, a number beyond 32 bits.
"""

from types import TracebackType

from thinslice.errors import ThinsliceError, plain

_KINDS = (Exception, ValueError, UnicodeEncodeError, OverflowError)


class named_library_errors:  # noqa: N801 - used like a function, as contextlib's are
    """A context manager that raises ``error_type`` for what the library raises."""

    def __init__(self, error_type: type[ThinsliceError], what: str) -> None:
        self._error_type = error_type
        self._what = what

    def __enter__(self) -> None:
        """Nothing is set up."""

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and (is_panic(error) or type(error) in _KINDS):
            first_line = str(error).partition("\n")[0]
            raise self._error_type(f"{self._what}: {plain(first_line, 160)}") from error


def is_panic(error: BaseException) -> bool:
    """Return whether the exception is a panic of a library written in Rust."""
    kind = type(error)
    return kind.__module__ == "pyo3_runtime" and kind.__name__ == "PanicException"
