"""Measure what a device can do: under a second. Of several passes the fastest counts."""

import time
from collections.abc import Callable

from thinslice.memory.device import Device
from thinslice.plan.device_predict import DeviceProfile
from thinslice.units import MIB

_PASSES = 5
_GEMM_SIZE = 2048


def measure_device(device: Device, num_bytes: int = 128 * MIB) -> DeviceProfile:
    """Measure copies from the host, reads of the device's memory, and products.

    Memory: ``num_bytes`` on either side, one after the other.
    """
    numbers = device.empty((num_bytes // 4,), "float32").zero_()
    target = device.bytes_of(numbers)
    source = device.page_locked(num_bytes)
    try:
        copy_s = _best_s(device, lambda: device.finish(device.copy(target, source, device.mark())))
    finally:
        device.unlock(source)
    read_s = _best_s(device, lambda: numbers.sum())
    a = device.empty((_GEMM_SIZE, _GEMM_SIZE), "bfloat16").zero_()
    product_s = _best_s(device, lambda: a @ a)
    return DeviceProfile(num_bytes / copy_s, num_bytes / read_s, 2 * _GEMM_SIZE**3 / product_s)


def _best_s(device: Device, work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(_PASSES):
        device.finish(device.mark())
        start = time.perf_counter()
        work()
        device.finish(device.mark())
        best = min(best, time.perf_counter() - start)
    return best
