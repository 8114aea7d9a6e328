"""A device in host memory that does nothing before it must, and notices what a card would not say.

A copy is done at the last moment that its event allows, in the order of asking; until then its
target holds nonsense, and its source is watched. So computing that does not wait, a source that is
changed too early, and a buffer that is copied into while it is still computed with all show.
"""

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tests.arrays import tensor_of
from thinslice.units import GIB, MIB

NONSENSE = 0xA5
# Host memory as an array, or the twin's own as a tensor.
Memory = NDArray[np.generic] | torch.Tensor


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

    def uses(self, buffer: NDArray[np.uint8]) -> bool:
        first, stop = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes
        return any(first <= one.data_ptr() < stop for one in (self.source, self.target))

    def is_before(self, source: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether one of the two sees the difference this copy makes."""
        return self.target.data_ptr() in (source.data_ptr(), target.data_ptr()) or (
            self.source.data_ptr() == target.data_ptr()
        )

    @torch.inference_mode()
    def do(self) -> None:
        assert torch.equal(self.source, self.content), "a source changed before it was copied"
        self.target.copy_(self.source)


class TwinDevice:
    """See thinslice.memory.device.Device."""

    def __init__(self, memory_bytes: int = GIB) -> None:
        self.name = "cuda"
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
        return torch.inference_mode()

    def total_bytes(self) -> int:
        return self.context_bytes + self.memory_bytes

    def free_bytes(self) -> int:
        return self.memory_bytes

    def hold_to(self, num_bytes: int) -> None:
        self.held_to = num_bytes

    def peak_bytes(self) -> int:
        return self.context_bytes + 64 * MIB

    def moved(self, data: NDArray[np.generic]) -> torch.Tensor:
        return tensor_of(data).clone()

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype))

    def bytes_of(self, data: torch.Tensor) -> torch.Tensor:
        return data.view(-1).view(torch.uint8)

    def numbers_of(self, data: torch.Tensor, dtype: str) -> torch.Tensor:
        return data.view(getattr(torch, dtype))

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        self.num_locked += 1
        whole = np.empty(num_bytes + 4096, np.uint8)
        start = -whole.ctypes.data % 4096
        return whole[start : start + num_bytes]

    def unlock(self, buffer: NDArray[np.uint8]) -> None:
        with self._lock:
            waiting = self._copies[self._num_done :]
        assert not any(copy.uses(buffer) for copy in waiting), "unlocked under a copy"
        self.num_locked -= 1

    def copy(self, target: Memory, source: Memory, after: TwinEvent | None) -> TwinEvent:
        target, source = _tensor(target), _tensor(source)
        assert (target.dtype, target.shape) == (source.dtype, source.shape), "not the same bytes"
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


def _tensor(memory: Memory) -> torch.Tensor:
    """The same memory as a tensor."""
    if isinstance(memory, torch.Tensor):
        return memory
    assert memory.flags.c_contiguous, "bytes that do not lie together"
    return tensor_of(memory)
