"""Whose turn it is to change an engine: one thread's at a time, and nobody's once Python ends."""

import os
import threading


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
