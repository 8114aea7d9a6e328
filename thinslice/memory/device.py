"""What streaming to an accelerator asks of it.

A card is one (cuda_device.py); tests have another.
"""

import os
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.arrays import Array


def missing_for_cuda() -> str | None:
    """What is missing to compute on a CUDA card, and what would help; None where nothing is."""
    if find_spec("torch") is None:
        return "torch, which runs there, is missing; pip install 'thinslice[cuda]'"
    try:
        os.getcwd()  # without one, importing torch ends the process
    except OSError as error:
        return f"torch, which runs there, needs a working directory: {error.strerror}"
    try:
        cuda_device = import_module("thinslice.memory.cuda_device")
    except (ImportError, OSError) as error:  # of the libraries that it loads
        return f"torch, which runs there, cannot be imported: {str(error).partition(chr(10))[0]}"
    missing: str | None = cuda_device.missing()
    return missing


class Event(Protocol):
    """A moment in a device's work."""


class Device(Protocol):
    """An accelerator with memory of its own: it computes in one order, and copies in another.

    Attributes:
        name: as a user names it: ``cuda``.
        context_bytes: of its memory, what its driver and libraries hold of it for this process.
    """

    name: str
    context_bytes: int

    def current(self) -> AbstractContextManager[object]:
        """Inside, what this thread computes goes to this device."""

    def total_bytes(self) -> int:
        """All its memory."""

    def free_bytes(self) -> int:
        """Memory that is free now."""

    def hold_to(self, num_bytes: int) -> None:
        """Refuse this process more of the device's memory than this, the context included."""

    def peak_bytes(self) -> int:
        """The most of its memory that this process has held so far, the context included."""

    def moved(self, data: NDArray[np.generic]) -> Array:
        """The same numbers on the device."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory of the device for numbers: float32, bfloat16, float16, int8 or uint8."""

    def bytes_of(self, data: Array) -> Array:
        """The same memory of the device as bytes, [num_bytes]."""

    def numbers_of(self, data: Array, dtype: str) -> Array:
        """Bytes of the device as numbers of a type, [count]."""

    def page_locked(self, num_bytes: int) -> NDArray[np.uint8]:
        """Host memory, uint8, that copies read at the link's full speed; all pages in place."""

    def unlock(self, buffer: NDArray[np.uint8]) -> None:
        """Let page-locked memory go; no copy may be using it."""

    def copy(self, target: Array, source: Array, after: Event | None) -> Event:
        """Begin to copy between page-locked and device memory once ``after`` has passed, in the
        order of calls; gives when it will be done. ``source`` must stay as it is until then."""

    def mark(self) -> Event:
        """When all that was asked to be computed so far will be done."""

    def wait(self, event: Event) -> None:
        """Compute nothing more until then; returns at once."""

    def finish(self, event: Event) -> None:
        """Wait until then."""
