"""A file read past the page cache, which would otherwise hold a second copy of what is read.

Cached pages are charged to the process's control group, and no cache smaller than the whole file
helps a cyclic walk over it.
"""

import errno
import fcntl
import mmap
import os
import sys
from pathlib import Path

from thinslice.checkpoint.files import file_size, os_errors_named
from thinslice.errors import CheckpointError

_MOUNTS = Path("/proc/self/mountinfo")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")

# O_DIRECT wants offset, length and address to be multiples of the disk's logical block, which is
# 512 or 4096 bytes.
ALIGNMENT = 4096


class UncachedFile:
    """An open file for positioned reads of aligned ranges. Threads may read at the same time.

    Attributes:
        is_direct: the system was told to keep the file out of the page cache (O_DIRECT on Linux,
            F_NOCACHE on macOS) and agreed. Where it did not, each range is dropped from the cache
            once it is read.
    """

    def __init__(self, path: Path, descriptor: int, is_direct: bool) -> None:
        self.path = path
        self.is_direct = is_direct
        self._descriptor = descriptor
        self._identity = _identity(os.fstat(descriptor))

    @classmethod
    def open(cls, path: Path) -> "UncachedFile":
        """Open a regular file.

        Errors: CheckpointError if there is none or it cannot be opened.
        """
        file_size(path)
        with os_errors_named(path):
            if sys.platform == "linux":
                descriptor = _open_direct(path)
                if descriptor is not None:
                    return cls(path, descriptor, is_direct=True)
            descriptor = os.open(path, os.O_RDONLY)
            return cls(path, descriptor, is_direct=_turn_cache_off(descriptor))

    def read(self, view: memoryview, offset: int, num_needed: int) -> None:
        """Read into ``view``, of which the first ``num_needed`` bytes must come.

        Args:
            view: its address and length are multiples of ALIGNMENT, and so is ``offset``. What the
                file has not, past its end, is left as it is.

        Errors: CheckpointError if the file cannot be read or is too short.
        """
        done = 0
        with os_errors_named(self.path):
            while True:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
                if done + count >= num_needed:
                    break
                whole = count // ALIGNMENT * ALIGNMENT  # the next read must be aligned as well
                if whole == 0:
                    raise CheckpointError(
                        f"{self.path} ends at byte {offset + done + count}: "
                        "it changed while in use; load the model again"
                    )
                done += whole
            if not self.is_direct and sys.platform == "linux":
                os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Errors: CheckpointError if the path is gone, leads to another file, or was written to."""
        with os_errors_named(self.path):
            identity = _identity(os.stat(self.path))
        if identity != self._identity:
            raise CheckpointError(f"{self.path} changed while in use; load the model again")

    def close(self) -> None:
        """Close the file; it cannot be read again."""
        os.close(self._descriptor)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _open_direct(path: Path) -> int | None:
    """A descriptor with O_DIRECT, or None where the file system cannot read so.

    Some file systems refuse when the file is opened, others at the first read. Those that live in
    memory accept it, but their files are the very pages that direct reads are to avoid.
    """
    if _file_system(os.stat(path).st_dev) in _MEMORY_FILE_SYSTEMS:
        return None
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, ALIGNMENT) as page:
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return descriptor


def _file_system(device: int) -> str | None:
    """The type of the file system on a device, such as ext4, or None if the system hides it."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    if not _MOUNTS.exists():
        return None
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == wanted:
            return source.split()[0]
    return None


def _turn_cache_off(descriptor: int) -> bool:
    """Whether the system agreed; where it cannot, at least nothing is read ahead."""
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return True
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return False
