"""A class with a ``close`` as a context manager."""

from types import TracebackType
from typing import Self


class Closing:
    """``with`` closes at the end, whatever happened in between."""

    def close(self) -> None:
        """Release everything that is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
