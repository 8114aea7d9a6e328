"""The command ``thinslice serve`` in a process of its own, perhaps inside a control group."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ServedProcess:
    """A server that answers.

    Attributes:
        port: on loopback.
        key: that it takes; none where that is empty.
    """

    process: "subprocess.Popen[bytes]"
    port: int
    key: str = ""

    def get(self, path: str) -> str:
        """The answer to a GET."""
        headers = {"x-api-key": self.key} if self.key else {}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def plan(self) -> dict[str, Any]:
        """What ``/plan`` tells."""
        found: dict[str, Any] = json.loads(self.get("/plan"))
        return found

    def metric(self, name: str) -> float:
        """A gauge or a counter without labels."""
        found = re.search(rf"^thinslice_{name} (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def memory(self, name: str) -> int:
        """A line of the process's status, as RssAnon or VmHWM, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None, name
        return int(found[1]) * 1024

    def wait_until_idle(self, limit_s: float = 60.0) -> None:
        """Until nothing waits, runs or holds a block. Errors: AssertionError."""
        names = ("num_waiting", "num_running", "kv_blocks_used")
        until = time.monotonic() + limit_s
        while left := {name: count for name in names if (count := self.metric(name))}:
            assert time.monotonic() < until, left
            time.sleep(0.02)


@contextmanager
def served_process(
    model: str, *options: str, log: Path, group: Path | None = None, key: str = "", port: int = 0
) -> Iterator[ServedProcess]:
    """A server that ends with the block.

    Args:
        log: file of what it writes.
        group: the control group that it runs in.
    """
    enter = "" if group is None else f"echo $$ > {group}/cgroup.procs; "
    called = [sys.executable, "-m", "thinslice", "serve", model, "--port", str(port), *options]
    with (
        open(log, "wb") as written,
        subprocess.Popen(["sh", "-c", f'{enter}exec "$@"', "sh", *called], stderr=written) as found,
    ):
        try:
            yield ServedProcess(found, _port_of(found, log), key)
        finally:
            found.kill()


def _port_of(process: "subprocess.Popen[bytes]", log: Path) -> int:
    until = time.monotonic() + 120
    while (told := re.search(r"http://127\.0\.0\.1:(\d+)/v1", log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, "the server did not start"
        time.sleep(0.02)
    return int(told[1])
