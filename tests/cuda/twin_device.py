"""A device in host memory that does nothing before it must, and notices what a card would not say.

A copy is done at the last moment that its event allows, in the order of asking; until then its
target holds nonsense, and its source is watched. So computing that does not wait, a source that is
changed too early, and a buffer that is copied into while it is still computed with all show.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from thinslice.units import GIB, MIB

NONSENSE = 0xA5


@dataclass(eq=False)
class TwinEvent:
    """A moment: copies up to a number, or computing up to a number."""

    copies: int = 0
    computed: int = 0


@dataclass(eq=False)
class _Copy:
    target: torch.Tensor
    source: torch.Tensor
    content: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.content = self.source.clone()
        self.target.fill_(NONSENSE)

    def uses(self, buffer: torch.Tensor) -> bool:
        first, stop = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
        return any(first <= one.data_ptr() < stop for one in (self.source, self.target))

    def is_before(self, source: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether one of the two sees the difference this copy makes."""
        return self.target.data_ptr() in (source.data_ptr(), target.data_ptr()) or (
            self.source.data_ptr() == target.data_ptr()
        )

    def do(self) -> None:
        assert torch.equal(self.source, self.content), "a source changed before it was copied"
        self.target.copy_(self.source)


class TwinDevice:
    """See thinslice.memory.device.Device."""

    def __init__(self, memory_bytes: int = GIB) -> None:
        self.name = "cuda"
        self.place = torch.device("cpu")
        self.context_bytes = 300 * MIB
        self.memory_bytes = memory_bytes
        self.held_to: int | None = None
        self.num_locked = 0
        self.num_copied_bytes = 0
        self._lock = threading.Lock()
        self._copies: list[_Copy] = []
        self._num_done = 0
        self._num_computed = 0
        # Address of each buffer in use, and the count of computing that must pass before a copy.
        self._in_use: dict[int, int] = {}

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def total_bytes(self) -> int:
        return self.context_bytes + self.memory_bytes

    def free_bytes(self) -> int:
        return self.memory_bytes

    def hold_to(self, num_bytes: int) -> None:
        self.held_to = num_bytes

    def peak_bytes(self) -> int:
        return self.context_bytes + 64 * MIB

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        self.num_locked += 1
        whole = torch.empty(num_bytes + 4096, dtype=torch.uint8)
        start = -whole.data_ptr() % 4096
        return whole[start : start + num_bytes]

    def unlock(self, buffer: torch.Tensor) -> None:
        with self._lock:
            waiting = self._copies[self._num_done :]
        assert not any(copy.uses(buffer) for copy in waiting), "unlocked under a copy"
        self.num_locked -= 1

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: TwinEvent | None
    ) -> TwinEvent:
        with self._lock:
            # Copies are made in order, so that one may read what another one wrote.
            waiting = enumerate(self._copies[self._num_done :], self._num_done + 1)
            before = [count for count, one in waiting if one.is_before(source, target)]
            self._do(max(before, default=0))
            needed = self._in_use.pop(target.data_ptr(), 0)
            passed = 0 if after is None else after.computed
            assert passed >= needed, "a copy into a buffer that is still computed with"
            self._copies.append(_Copy(target, source))
            self.num_copied_bytes += source.numel()
            return TwinEvent(copies=len(self._copies))

    def mark(self) -> TwinEvent:
        with self._lock:
            self._num_computed += 1
            return TwinEvent(computed=self._num_computed)

    def wait(self, event: TwinEvent) -> None:
        with self._lock:
            self._do(event.copies)
            if event.copies:
                used = self._copies[event.copies - 1].target.data_ptr()
                self._in_use[used] = self._num_computed + 1

    def finish(self, event: TwinEvent) -> None:
        with self._lock:
            self._do(event.copies)

    def _do(self, count: int) -> None:
        for copy in self._copies[self._num_done : count]:
            copy.do()
        self._num_done = max(self._num_done, count)
