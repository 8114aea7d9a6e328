"""A program in a terminal of its own, typed into and read as a user would."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

DEADLINE_S = 120.0
# Stands in what is shown for the sequence that asks a terminal to mark pastes: the line editor
# sends it once it reads the keys.
PASTES_MARKED = "\x01"
_SEQUENCE = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|[@-Z\\-_=>])")
_FORWARD = re.compile(rb"\x1b\[(\d*)C")


class TerminalProgram:
    """One program and the other side of its terminal.

    Attributes:
        shown: what it has written so far, without the sequences that move the cursor.
    """

    def __init__(self, arguments: list[str], env: Mapping[str, str], columns: int) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # The terminal's size is there before the program asks for it.
            size = struct.pack("HHHH", 24, columns, 0, 0)
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            os.execve(arguments[0], arguments, dict(env))
        self._raw = b""
        self._read_to = 0
        self._is_over = False
        self.status: int | None = None

    @property
    def raw(self) -> str:
        """All that it has written."""
        return self._raw.decode("utf-8", "replace")

    @property
    def shown(self) -> str:
        marked = self._raw.replace(b"\x1b[?2004h", PASTES_MARKED.encode())
        spaced = _FORWARD.sub(lambda match: b" " * int(match[1] or 1), marked)
        return _SEQUENCE.sub(b"", spaced).decode("utf-8", "replace")

    def wait_for(self, text: str) -> str:
        """Read until this text has come since the last call; returns what came up to its end."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown[self._read_to :]:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown[-2000:]!r}"
            assert not self._is_over, f"ended with {self.shown[-2000:]!r}"
            self._read(1.0)
        end = self.shown.index(text, self._read_to) + len(text)
        before, self._read_to = self.shown[self._read_to : end], end
        return before

    def wait_for_more(self) -> None:
        """Read until more than spaces is shown behind what was waited for."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.shown[self._read_to :].strip():
            assert time.monotonic() < deadline, f"no more behind {self.shown[-2000:]!r}"
            self._read(1.0)

    def wait_for_prompt(self) -> str:
        """Read until a new prompt waits for keys; returns what was shown before it."""
        shown = self.wait_for(PASTES_MARKED)
        self.wait_for(">>> ")
        return shown

    def type(self, text: str) -> None:
        """Write keys, reading meanwhile what the program shows, as a terminal does."""
        done = threading.Event()

        def write() -> None:
            data = text.encode()
            while data:
                data = data[os.write(self._fd, data[:512]) :]
            done.set()

        threading.Thread(target=write, daemon=True).start()
        deadline = time.monotonic() + DEADLINE_S
        while not done.is_set():
            assert time.monotonic() < deadline, "the program does not read its terminal"
            self._read(0.01)

    def peak_bytes(self) -> int:
        """The most memory it has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def end(self) -> int:
        """Read to its end; returns its exit code, or the negative number of its signal."""
        deadline = time.monotonic() + DEADLINE_S
        while self.status is None:
            assert time.monotonic() < deadline, f"still runs after {self.shown[-2000:]!r}"
            self._read(0.1)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        while self._read(0.0):
            pass
        return self.status

    def close(self) -> None:
        """Kill it where it still runs."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def _read(self, timeout_s: float) -> bool:
        """Read what comes in this time; False where nothing came."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:
            data = b""
        self._raw += data
        self._is_over = not data
        return bool(data)


@contextmanager
def thinslice_in_terminal(
    *arguments: str, home: Path, columns: int = 80
) -> Iterator[TerminalProgram]:
    """The command line in a terminal; killed at the end where it still runs."""
    # The size is the terminal's own, whatever a library has put into the environment.
    env = {
        **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        "XDG_STATE_HOME": str(home / "state"),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    program = TerminalProgram([sys.executable, "-m", "thinslice", *arguments], env, columns)
    try:
        yield program
    finally:
        program.close()
