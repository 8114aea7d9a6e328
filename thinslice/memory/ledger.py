"""What the models of this process may still come to hold, so that no byte is promised twice.

A plan begins above what the process holds. A model that is loaded holds less than its plan at
first: pages of its KV cache come as they are written, and what it works in comes with its first
steps. The next plan begins above all of that.
"""

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from threading import Lock

import torch

from thinslice.memory.meter import rss_to_plan_from
from thinslice.memory.process_state import resident_bytes
from thinslice.plan.memory_plan import MemoryPlan


class Reservation:
    """What one model may come to hold, from its plan until it is released or let go.

    Args:
        parts: of the plan, by name, without the runtime: that the process had before.
    """

    def __init__(self, parts: Mapping[str, int]) -> None:
        self._parts = dict(parts)
        self._caches: list[torch.Tensor] = []

    def taken(self, caches: Iterable[torch.Tensor]) -> None:
        """The model is loaded: its weights are in place, its caches come page by page."""
        self._parts["weights"] = 0
        self._caches = list(caches)

    def release(self) -> None:
        """The model has been closed."""
        self._parts, self._caches = {}, []

    def to_come_bytes(self) -> int:
        """What of it is not held yet; more than that where nothing tells what is."""
        held = sum(resident_bytes(one.data_ptr(), one.nbytes) for one in self._caches)
        return max(sum(self._parts.values()) - held, 0)


class Ledger:
    """The reservations of this process."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open = weakref.WeakSet[Reservation]()

    def runtime_bytes(self) -> int:
        """What a plan begins above: what the process holds, and what its models will."""
        return rss_to_plan_from() + sum(one.to_come_bytes() for one in list(self._open))

    @contextmanager
    def planning(self) -> Iterator[int]:
        """For one plan at a time, its reservation included: gives what it begins above."""
        with self._lock:
            yield self.runtime_bytes()

    def reserve(self, chosen: MemoryPlan) -> Reservation:
        """Promise a model what its plan has for it; called within ``planning``."""
        assert self._lock.locked(), "a plan that others may have made as well"
        parts = chosen.parts if chosen.device is None else chosen.device.host_parts
        own = {name: num_bytes for name, num_bytes in parts if name != "runtime"}
        reservation = Reservation(own)
        self._open.add(reservation)
        return reservation

    def forked(self) -> None:
        """In a child: whoever was planning is not here."""
        self._lock = Lock()


@cache
def ledger() -> Ledger:
    """The one of this process."""
    made = Ledger()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.forked)
    return made
