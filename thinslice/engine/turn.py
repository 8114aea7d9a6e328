"""Whose turn it is to change an engine: one thread's at a time, and nobody's once Python ends."""

import os
import threading
import weakref
from collections.abc import Callable, Sized
from types import TracebackType
from typing import Any

from thinslice.errors import BusyError


class Turn:
    """A lock that outlives a fork and ends with the interpreter.

    When the interpreter ends, every thread that then asks for the lock of Python's is ended where
    it is. In the middle of a compiled call that aborts the process. So ``keep`` waits at exit for
    the step that is running, and whoever wants to run another one waits for its turn for good.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()

    @property
    def lock(self) -> "threading.RLock":
        """To be held while the engine is changed; the thread that holds it may take it again.

        A child of a fork has a new one: it has none of the threads that may have held the old one.
        """
        if self._pid != os.getpid():
            self._lock, self._pid = threading.RLock(), os.getpid()
        return self._lock

    def keep(self) -> None:
        """Take the last turn, for good."""
        if self._pid == os.getpid():
            self._lock.acquire()

    @property
    def is_mine(self) -> bool:
        """Whether this thread holds the lock."""
        return bool(self.lock._is_owned())  # type: ignore[attr-defined] # as Condition asks it


class Operation:
    """What is done within, by the thread whose turn it is, is done as a whole or undone: at its
    end, or before the next one where its end is interrupted as well.

    Args:
        settle: undoes what was interrupted, and does what was put off.
        put_off: what is to be done by that.

    """

    def __init__(self, turn: Turn, settle: Callable[[], None], put_off: Sized) -> None:
        self._turn = turn
        self._settle: Any = weakref.WeakMethod(settle)
        self._put_off = put_off
        self._pid: int | None = None  # of the process that is within

    @property
    def is_running(self) -> bool:
        """Whether the thread whose turn it is, is within. Not in a child that was forked then."""
        return self._pid == os.getpid()

    @property
    def is_mine(self) -> bool:
        """Whether this thread is within already: who asks is a signal handler then, the finaliser
        of an object that was let go of in the middle of it, or a callback."""
        return self.is_running and self._turn.is_mine

    def check_entry(self) -> None:
        """Errors: BusyError where this thread is within."""
        if self.is_mine:
            raise BusyError(
                "this thread is in the middle of the engine's work: a signal handler, a finaliser "
                "or a callback can abort requests, and nothing else"
            )

    def __enter__(self) -> None:
        self._settle_within()
        self._pid = os.getpid()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._settle_within()
        while self._put_off:  # by a handler that came when it was done
            self._settle_within()

    def _settle_within(self) -> None:
        try:
            self._pid = os.getpid()
            self._settle()()
        finally:
            self._pid = None
