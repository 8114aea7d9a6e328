"""What NVIDIA's driver says of its cards' memory, without a context of CUDA, which takes some."""

import ctypes

from thinslice.errors import ConfigError

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    """nvmlMemory_t. Source: nvml.h."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def missing() -> str | None:
    """What is missing to ask the driver; None where nothing is."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return (
            f"{_LIBRARY}, a part of NVIDIA's driver, is not there; without it what the CUDA "
            "context takes cannot be measured"
        )
    return None


def used_bytes() -> int:
    """Memory in use on all cards together, by whomever; the library is there.

    Errors: ConfigError where the driver does not answer.
    """
    library = ctypes.CDLL(_LIBRARY)
    _check("nvmlInit_v2", library.nvmlInit_v2())
    try:
        count = ctypes.c_uint()
        _check("nvmlDeviceGetCount_v2", library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        return sum(_used_by(library, index) for index in range(count.value))
    finally:
        library.nvmlShutdown()


def _used_by(library: ctypes.CDLL, index: int) -> int:
    handle, memory = ctypes.c_void_p(), _Memory()
    code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    _check("nvmlDeviceGetHandleByIndex_v2", code)
    code = library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    _check("nvmlDeviceGetMemoryInfo", code)
    return int(memory.used)


def _check(call: str, code: int) -> None:
    if code != 0:
        raise ConfigError(f"--device cuda: {call} of NVIDIA's driver failed with code {code}")
