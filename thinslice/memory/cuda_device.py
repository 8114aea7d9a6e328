"""A CUDA card as a device: thin words around torch.cuda, and nothing that could be decided here."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from thinslice.kernels.arrays import Array, aligned_buffer
from thinslice.kernels.torch_ops import tensor_of
from thinslice.memory import nvml
from thinslice.memory.device import Event

# Rows of the products that make cuBLAS load its code and take what it works in.
_WARM_UP = 256


def missing() -> str | None:
    """What is missing to compute on a CUDA card, and what would help; None where nothing is."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA; install one that has it"
    if not torch.cuda.is_available():
        return "torch finds no CUDA card here; --device cpu runs on the processor"
    if find_spec("triton") is None:
        return "Triton, which the kernels are written in, is missing; pip install thinslice[cuda]"
    return nvml.missing()


def cards() -> list[tuple[str, int]]:
    """Name and bytes of memory of each card."""
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(one.name, one.total_memory) for one in every]


class CudaDevice:
    """The current CUDA card; see Device. Opening it makes CUDA's context, if there is none yet."""

    def __init__(self) -> None:
        self.name = "cuda"
        self.place = torch.device("cuda", torch.cuda.current_device())
        self.context_bytes = _context_bytes()
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._copying = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(self.place):
            yield

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.place)[1]

    def free_bytes(self) -> int:
        # What torch's allocator keeps of this process's own tensors is free to it as well.
        kept = torch.cuda.memory_reserved(self.place) - torch.cuda.memory_allocated(self.place)
        return torch.cuda.mem_get_info(self.place)[0] + kept

    def hold_to(self, num_bytes: int) -> None:
        share = (num_bytes - self.context_bytes) / self.total_bytes()
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), self.place)

    def peak_bytes(self) -> int:
        return self.context_bytes + torch.cuda.max_memory_reserved(self.place)

    def moved(self, data: NDArray[np.generic]) -> torch.Tensor:
        return tensor_of(data).to(self.place)

    def empty(self, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.place)

    def bytes_of(self, data: Array) -> Array:
        return data.view(-1).view(torch.uint8)

    def numbers_of(self, data: Array, dtype: str) -> Array:
        return data.view(getattr(torch, dtype))

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        # Registered, not asked of torch's allocator, which rounds up to a power of two.
        buffer = aligned_buffer(num_bytes)
        if num_bytes:
            code = self._runtime.cudaHostRegister(buffer.ctypes.data, num_bytes, 0)
            torch.cuda.check_error(int(code))
        return buffer

    def unlock(self, buffer: NDArray[np.uint8]) -> None:
        if buffer.size:
            code = self._runtime.cudaHostUnregister(buffer.ctypes.data)
            torch.cuda.check_error(int(code))

    def copy(self, target: Array, source: Array, after: Event | None) -> Event:
        with torch.cuda.stream(self._copying):
            if after is not None:
                assert isinstance(after, torch.cuda.Event), "an event of another device"
                self._copying.wait_event(after)
            _tensor(target).copy_(_tensor(source), non_blocking=True)
            event: Event = self._copying.record_event()
            return event

    def mark(self) -> Event:
        event: Event = torch.cuda.current_stream(self.place).record_event()
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "an event of another device"
        torch.cuda.current_stream(self.place).wait_event(event)

    def finish(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), "an event of another device"
        event.synchronize()


def _tensor(data: Array) -> torch.Tensor:
    return tensor_of(data) if isinstance(data, np.ndarray) else data


@cache
def _context_bytes() -> int:
    """What the context and the libraries' code take: what is used after making them and not before.

    Where CUDA was in use in this process before, all that is used on the cards and not by torch's
    tensors counts: an upper bound.
    """
    is_in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    before = 0 if is_in_use else nvml.used_bytes()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(_WARM_UP, _WARM_UP, dtype=dtype, device="cuda")
        x @ x
    torch.cuda.synchronize()
    return max(nvml.used_bytes() - before - torch.cuda.memory_reserved(), 0)
