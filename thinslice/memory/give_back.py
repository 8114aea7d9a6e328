"""Give memory back to the system that was let go of and that the allocator still keeps."""

import ctypes
import gc


def give_back() -> None:
    """Collect what only cycles hold, and return free pages of the heap to the system.

    The next model in this process then plans for what is really held. Where the C library has no
    malloc_trim, as musl and macOS, its allocator returns pages by itself.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
