"""Pack a model again and again, each time killed (SIGKILL) some steps later than the time before.

A step is a write, a sync, or whatever the interpreter tells its audit hooks before it changes the
file system; a write is killed half done. After every kill all bytes that the journal does not vouch
for are overwritten, as a power failure may leave them, and the packing is made once more, to its
end. Prints one JSON object for each kill. Run by test_resume.py as a process of its own, because
it forks and has no threads.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.pack import layout, write_weights
from thinslice.pack.convert import convert
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.pack.part import PART, read_journal
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import packing_for

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def main() -> None:
    source, base, stride = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    layout._SLICE_WEIGHTS = 4096
    write_weights.SYNC_BYTES = 16384
    in_child(lambda: pack(source, base / "whole"))
    reference = contents(base / "whole")
    step = 0
    while not in_child(lambda: killed_at(step, source, base / str(step))):  # noqa: B023
        out = base / str(step)
        left = sorted(path.name for path in out.iterdir()) if out.exists() else []
        journal = read_journal(out)
        if (out / PART).exists() and journal is not None:
            in_child(lambda: scramble_after(source, out, journal[1]))  # noqa: B023
        in_child(lambda: pack(source, out))  # noqa: B023
        is_same = contents(out) == reference
        done = 0 if journal is None else journal[1]
        print(json.dumps({"left": left, "done": done, "is_same": is_same}), flush=True)
        step += stride


def pack(source: Path, out: Path) -> None:
    pack_model(open_checkpoint(source), out, PackOptions(PackedFormat.INT4, "tiny"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_child(act: Any) -> bool:
    """Whether it came to its end; False where it was killed. Torch's threads stay in the child."""
    child = os.fork()
    if child == 0:
        # An exception ends the process with its traceback and status 1, as anywhere.
        act()
        sys.stderr.flush()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == 0


def killed_at(step: int, source: Path, out: Path) -> None:
    steps_left = step

    def count() -> None:
        nonlocal steps_left
        if steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        steps_left -= 1

    def hook(event: str, args: tuple[Any, ...]) -> None:
        flags = args[2] if event == "open" else 0
        if event in _CHANGES or (isinstance(flags, int) and flags & _WRITES):
            count()

    real_write, real_sync = os.pwrite, os.fsync

    def half_write(file: int, data: memoryview, offset: int) -> int:
        if steps_left == 0:
            real_write(file, data[: len(data) // 2], offset)
        count()
        return real_write(file, data, offset)

    def sync(file: int) -> None:
        count()
        real_sync(file)

    sys.addaudithook(hook)
    os.pwrite, os.fsync = half_write, sync
    pack(source, out)


def scramble_after(source: Path, out: Path, num_slices: int) -> None:
    checkpoint = open_checkpoint(source)
    work = layout.layout_of(checkpoint, packing_for(checkpoint.shape, PackedFormat.INT4)).work
    slices = [(one, *rows) for one in work for rows in one.ranges()]
    with CheckpointReader(checkpoint) as reader, (out / PART).open("r+b") as part:
        for one, start, stop in slices[num_slices:]:
            for offset, data in convert(reader, one, start, stop):
                part.seek(offset)
                part.write(b"\xa5" * data.size)


main()
