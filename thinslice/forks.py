"""Locks that a child of a fork can take: none of the threads that may hold one lives on in it."""

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")
AnyLock = TypeVar("AnyLock", "threading.RLock", threading.Condition)

# A fork waits for the end of what is done within: that takes locks of Python's import, or of a
# library's own, which cannot be made free in the child.
fork_waits = threading.RLock()

# Of locks and conditions, which have no common class.
_LOCKS = weakref.WeakSet[Any]()


def fork_safe(lock: AnyLock) -> AnyLock:
    """The same lock or condition, which is free in a child of a fork unless the thread that forks
    holds it: that one lives on in the child, and gives it back."""
    _LOCKS.add(lock)
    return lock


def is_mine(lock: "threading.RLock") -> bool:
    """Whether this thread holds the lock."""
    return bool(lock._is_owned())  # type: ignore[attr-defined] # as Condition asks it


class cached_property(functools.cached_property[Value]):  # noqa: N801 # as the one it replaces
    """Python's, whose lock, which Python 3.11 has for each, is free in a child of a fork."""

    def __init__(self, make: Callable[[Any], Value]) -> None:
        super().__init__(make)
        if hasattr(self, "lock"):
            fork_safe(self.lock)


def _in_child() -> None:
    for lock in _LOCKS:
        if not lock._is_owned():
            lock._at_fork_reinit()  # as Python's own modules do


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
    os.register_at_fork(
        before=fork_waits.acquire,
        after_in_parent=fork_waits.release,
        after_in_child=fork_waits.release,
    )
