"""What streaming to an accelerator asks of it.

A card is one (cuda_device.py); tests have another.
"""

from contextlib import AbstractContextManager
from typing import Protocol

import torch


class Event(Protocol):
    """A moment in a device's work."""


class Device(Protocol):
    """An accelerator with memory of its own: it computes in one order, and copies in another.

    Attributes:
        name: as a user names it: ``cuda``.
        place: where its tensors lie.
        context_bytes: of its memory, what its driver and libraries hold of it for this process.
    """

    name: str
    place: torch.device
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

    def page_locked(self, num_bytes: int) -> torch.Tensor:
        """Host memory, uint8, that copies read at the link's full speed; all pages in place."""

    def unlock(self, buffer: torch.Tensor) -> None:
        """Let page-locked memory go; no copy may be using it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None) -> Event:
        """Begin to copy between page-locked and device memory once ``after`` has passed, in the
        order of calls; gives when it will be done. ``source`` must stay as it is until then."""

    def mark(self) -> Event:
        """When all that was asked to be computed so far will be done."""

    def wait(self, event: Event) -> None:
        """Compute nothing more until then; returns at once."""

    def finish(self, event: Event) -> None:
        """Wait until then."""
