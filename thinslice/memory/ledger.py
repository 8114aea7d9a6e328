"""What the models of this process may still come to hold, so that no byte is promised twice.

A plan begins above what the process holds. A model that is loaded holds less than its plan at
first: pages of its KV cache come as they are written, and what it works in comes with its first
steps. The next plan begins above all of that. Main memory only: a card's is not in it.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import BusyError
from thinslice.forks import fork_safe, is_mine
from thinslice.memory.meter import resident_bytes, rss_to_plan_from
from thinslice.plan.memory_plan import HELD_PARTS, MemoryPlan

# Parts whose pages are all in place once a model is loaded: weights are read, the others locked.
_IN_PLACE = ("weights", "staging", "spilled kv")


class Reservation:
    """What one model may come to hold, from its plan until it is released or let go.

    Args:
        parts: of the plan, by name, without what the process had before.
    """

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts = dict(parts)
        self._caches: list[NDArray[np.generic]] = []

    def taken(self, caches: Iterable[NDArray[np.generic]]) -> None:
        """The model is loaded: its weights are in place, its caches come page by page."""
        self._caches = list(caches)
        to_come = {name: size for name, size in self._parts.items() if name not in _IN_PLACE}
        self._parts = to_come

    def release(self) -> None:
        """The model has been closed."""
        self._parts, self._caches = {}, []

    def to_come_bytes(self) -> int:
        """Bytes it may still come to hold; more than that where nothing tells what it holds."""
        held = sum(resident_bytes(one.ctypes.data, one.nbytes) for one in self._caches)
        return max(sum(self._parts.values()) - held, 0)


class Planning:
    """A plan in the making.

    Attributes:
        runtime_bytes: what it begins above: what the process holds, and what its models will.
    """

    def __init__(self, runtime_bytes: int, held: "weakref.WeakSet[Reservation]") -> None:
        self.runtime_bytes = runtime_bytes
        self._held = held

    def reserve(self, chosen: MemoryPlan) -> Reservation:
        """Promise a model what its plan has for it."""
        parts = chosen.host.parts
        own = {name: num_bytes for name, num_bytes in parts if name not in HELD_PARTS}
        reservation = Reservation(own)
        self._held.add(reservation)
        return reservation


class Ledger:
    """The reservations of this process."""

    def __init__(self) -> None:
        self._lock = fork_safe(RLock())
        self._held = weakref.WeakSet[Reservation]()

    @contextmanager
    def planning(self) -> Iterator[Planning]:
        """For one plan at a time, its reservation included.

        Errors: BusyError in the middle of another plan of the same thread: in a signal handler.
        """
        if is_mine(self._lock):
            raise BusyError("a model is planned at this moment; load another one after that")
        with self._lock:
            # The promises first: what is taken between the two is then counted twice, not never.
            promised = self.promised_bytes()
            yield Planning(rss_to_plan_from() + promised, self._held)

    def promised_bytes(self, but: Reservation | None = None) -> int:
        """Bytes that models may still come to hold, those of one reservation left out."""
        return sum(one.to_come_bytes() for one in list(self._held) if one is not but)


_LEDGER = Ledger()


def ledger() -> Ledger:
    """The one of this process."""
    return _LEDGER
