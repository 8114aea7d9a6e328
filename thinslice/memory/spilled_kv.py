"""Blocks of a device's KV cache in page-locked host memory, and their copies there and back."""

from collections.abc import Sequence

import torch

from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.device import Device


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
        block = self._on_device[0][0]
        num_bytes = len(self._on_device) * num_blocks * block.numel() * block.itemsize
        self._buffer = device.page_locked(num_bytes)
        sizes = (len(self._on_device), num_blocks, *block.shape)
        self._on_host = self._buffer.view(block.dtype).view(sizes)

    def spill(self, block: int, host_block: int) -> None:
        """Copy a block to host memory; what is computed later waits until it is there."""
        for on_host, on_device in zip(self._on_host, self._on_device, strict=True):
            self._copy(on_host[host_block], on_device[block])

    def bring_back(self, host_block: int, block: int) -> None:
        """Copy a block to the device; what is computed later waits until it is there."""
        for on_host, on_device in zip(self._on_host, self._on_device, strict=True):
            self._copy(on_device[block], on_host[host_block])

    def close(self) -> None:
        """Let the host memory go."""
        self._device.unlock(self._buffer)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._device.wait(self._device.copy(target, source, self._device.mark()))
