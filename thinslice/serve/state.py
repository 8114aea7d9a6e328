"""Which servers run on this machine: a file for each, written by it and believed by nobody blindly.

A file names a process. It holds only where that process began when the file says, in the same boot
of the machine, and was called as a server is: a number that another process has got since names no
server. Files of servers that were killed are removed by whoever looks next.
"""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from thinslice.errors import ServerError, StoreError, shown
from thinslice.store.files import publish
from thinslice.store.store import default_root

_PROC = Path("/proc")
_LARGEST_FILE = 64 * 1024
_COMMAND = b"serve"
# Seconds between two looks at a server that ends.
_PAUSE_S = 0.2


@dataclass(frozen=True)
class ServerState:
    """A server, as its file tells it.

    Attributes:
        start: of the process, in clock ticks since the machine's boot.
        place: this boot of the machine, and the processes that see each other.
        machine: its name, where several share a home folder.
        budget_bytes: of the process.
        drain_s: seconds that answers under way may go on for when it is told to end.
        started_at: seconds since 1970.
    """

    pid: int
    start: int
    place: str
    machine: str
    host: str
    port: int
    model: str
    budget_bytes: int
    drain_s: float
    started_at: int

    @property
    def address(self) -> str:
        """Host and port."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_KINDS = {one.name: one.type for one in fields(ServerState)}


@dataclass
class Found:
    """The servers that run, and what was wrong with files, a line each."""

    servers: list[ServerState] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


def states_folder(environ: Mapping[str, str]) -> Path:
    """Where the files are: beside the models. Errors: StoreError as ``default_root``."""
    return Path(os.path.abspath(default_root(environ).parent / "servers"))


def own_state(
    address: tuple[str, int], model: str, budget_bytes: int, drain_s: float
) -> ServerState:
    """The state of this process, which serves.

    Errors: StoreError where the system does not tell when processes began.
    """
    start = _start_of(os.getpid())
    if start is None:
        raise StoreError("this system does not tell when a process began (no /proc)")
    return ServerState(
        pid=os.getpid(),
        start=start,
        place=_place(),
        machine=socket.gethostname(),
        host=address[0],
        port=address[1],
        model=model,
        budget_bytes=budget_bytes,
        drain_s=drain_s,
        started_at=int(time.time()),
    )


def write_state(state: ServerState, folder: Path) -> Path:
    """Write a server's file, for this user alone. Errors: StoreError where that cannot be."""
    # A later process of the same number has a file of its own.
    path = folder / f"{state.pid}-{state.start}.json"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise StoreError(f"{path}: {error.strerror or error}") from error
    return path


def remove_state(path: Path) -> None:
    """Remove a server's file. Where that cannot be, whoever looks next sees that it has ended."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def find_servers(folder: Path) -> Found:
    """The servers that run. Files of those that do not are removed.

    Errors: StoreError where the folder cannot be read.
    """
    found = Found()
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except FileNotFoundError:
        return found
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error.strerror or error}") from error
    for path in paths:
        try:
            state, is_own = _read(path)
        except FileNotFoundError:  # it ended just now
            continue
        except OSError as error:
            found.troubles.append(f"{path} cannot be read: {error.strerror or error}")
            continue
        except ValueError as error:
            found.troubles.append(f"{path} tells of no server, remove it: {error!s:.200}")
            continue
        if is_server(state):
            found.servers.append(state)
        elif is_own and _has_ended(state):
            remove_state(path)
    return found


def is_server(state: ServerState) -> bool:
    """Whether the process of a file is that server still, and no later one of its number."""
    if state.place != _place() or _start_of(state.pid) != state.start:
        return False
    return _serves(state.pid)


def memory_of(state: ServerState) -> tuple[int, int]:
    """What a server holds and has held at most, in bytes; zeros where it has ended."""
    try:
        lines = (_PROC / str(state.pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return 0, 0
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    now, peak = (int(told.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def tell_to_end(state: ServerState) -> int | None:
    """Send a server SIGTERM; a descriptor to wait on, or None where it has ended already.

    Errors: ServerError where it is another user's.
    """
    try:
        # What this refers to stays that process, whatever gets its number.
        descriptor = os.pidfd_open(state.pid)
    except ProcessLookupError:
        return None
    try:
        if is_server(state):
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            return descriptor
    except ProcessLookupError:
        pass
    except PermissionError:
        os.close(descriptor)
        raise ServerError(
            f"the server of {state.model} at {state.address}, process {state.pid}, is another "
            "user's and cannot be stopped"
        ) from None
    os.close(descriptor)
    return None


def wait_for_end(descriptor: int, limit_s: float, progress: Callable[[float], None]) -> bool:
    """Whether a process ends within so many seconds; closes the descriptor.

    Args:
        progress: called with the seconds that went by.
    """
    began = time.monotonic()
    looking = select.poll()
    looking.register(descriptor, select.POLLIN)
    try:
        while (passed := time.monotonic() - began) < limit_s:
            progress(passed)
            if looking.poll(_PAUSE_S * 1000):
                return True
        return bool(looking.poll(0))
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[ServerState, bool]:
    """A file's state, and whether it is this user's.

    Errors: OSError; ValueError for a file of something else.
    """
    with open(path, "rb") as file:
        is_own = os.fstat(file.fileno()).st_uid == os.geteuid()
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError("it is too large")
    try:
        given = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return _state(given), is_own


def _state(given: Any) -> ServerState:
    if not isinstance(given, dict) or given.keys() != _KINDS.keys():
        raise ValueError("its fields are others")
    for name, kind in _KINDS.items():
        # JSON has 30 for 30.0.
        if type(given[name]) is not kind and (kind, type(given[name])) != (float, int):
            raise ValueError(f"{name} is {shown(given[name])}")
    if not 0 < given["pid"] < 1 << 31 or not 0 <= given["port"] < 1 << 16:
        raise ValueError("its numbers are none of a process and a port")
    return ServerState(**given)


def _has_ended(state: ServerState) -> bool:
    """Whether a server that is not found has ended, and is not one that cannot be seen from here:
    of another machine with the same home folder, or of a container."""
    if state.machine != socket.gethostname():
        return False
    boot, _, view = _place().partition(" ")
    its_boot, _, its_view = state.place.partition(" ")
    return its_boot != boot or its_view == view


def _place() -> str:
    """This boot of the machine, and the numbering of processes that this one sees."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """When a process began; None where there is none of the number."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
        # Behind the name, which may hold anything: field 22 of all.
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _serves(pid: int) -> bool:
    """Whether a process was called as a server is: thinslice serve, by whatever Python."""
    try:
        called = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return (b"thinslice", _COMMAND) in pairwise(os.path.basename(one) for one in called)
