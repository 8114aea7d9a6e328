"""Blocks of a device's KV cache in page-locked host memory, and their copies there and back."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.device import Device, Event


@dataclass(frozen=True)
class BlockMove:
    """A block that is copied to its place in host memory, or back from there."""

    block: int
    host_block: int
    is_spill: bool


class SpilledKv:
    """Room for blocks of all layers in host memory.

    Args:
        caches: one for each layer, on the device.
        num_blocks: that fit.

    Memory: ``num_blocks`` blocks, page-locked until ``close``.
    """

    def __init__(self, device: Device, caches: Sequence[PagedKv], num_blocks: int) -> None:
        self._device = device
        self._on_device = [rows for cache in caches for rows in (cache.k, cache.v)]
        block_bytes = self._on_device[0][0].nbytes
        buffer = device.page_locked(len(self._on_device) * num_blocks * block_bytes)
        # Bytes on the host, and seen as bytes on the device when they are copied.
        self._on_host = buffer.reshape(len(self._on_device), num_blocks, block_bytes)
        self._buffer: NDArray[np.uint8] | None = buffer
        self._last: Event | None = None

    def move(self, moves: deque[BlockMove]) -> None:
        """Copy blocks in this order, each taken off the queue; what is computed later waits until
        all are in their places.

        Copies are made in the order of asking, so one of them may read what another one wrote.
        """
        computed = self._device.mark()
        while moves:
            move = moves[0]
            for on_host, on_device in zip(self._on_host, self._on_device, strict=True):
                there, here = on_host[move.host_block], self._device.bytes_of(on_device[move.block])
                target, source = (there, here) if move.is_spill else (here, there)
                self._last = self._device.copy(target, source, computed)
            moves.popleft()
        if self._last is not None:
            self._device.wait(self._last)

    def close(self) -> None:
        """Let the host memory go, once the copies that were asked for are done."""
        buffer, last = self._buffer, self._last
        self._buffer = self._last = None
        self._on_host = np.empty((0, 0, 0), np.uint8)
        try:
            if last is not None:
                self._device.finish(last)
        finally:
            if buffer is not None:
                self._device.unlock(buffer)
