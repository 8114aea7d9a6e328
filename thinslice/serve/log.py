"""The server's log: lines of text or JSON, written by a thread of their own.

Nobody who is answered waits for a disk or for whoever reads standard error. Where lines cannot be
written, or not as fast as they come, they are left out, and that is told.
"""

import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thinslice.closing import Closing
from thinslice.errors import ConfigError
from thinslice.serve.settings import LogFormat, ServerSettings

# Of lines that wait to be written.
_MOST_WAITING_BYTES = 1 << 20
# Seconds that the last lines have at the end.
_LAST_S = 2.0
_STDERR = 2
# Whose messages are lines of the log.
_LOGGERS = ("thinslice.serve", "uvicorn.error")


class Log(Closing):
    """Where lines go.

    Args:
        descriptor: of a file, which is closed at the end unless it is standard error.
    """

    def __init__(self, descriptor: int, kind: LogFormat) -> None:
        self._descriptor = descriptor
        self._kind = kind
        self._handler = _Handler(self)
        self._thread = threading.Thread(target=self._run, name="thinslice-log", daemon=True)
        self._is_whole = True  # the last line that was written
        self._is_told = False

        # All that follows is guarded by this condition's lock.
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._num_left_out = 0
        self._is_closed = False

    def start(self) -> None:
        """Begin to write, the messages of the server's loggers too."""
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
            logging.getLogger(name).propagate = False
        self._thread.start()

    def write(self, told: Mapping[str, Any], text: str) -> None:
        """Add a line; it waits for nothing.

        Args:
            told: the line as JSON has it.
            text: the same for a person.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = f"{now} {text}" if self._kind == "text" else json.dumps({"time": now, **told})
        # Text from elsewhere begins no line that could be taken for one of ours.
        line = line.replace("\r", "\\r").replace("\n", "\n    ")
        content = line.encode(errors="replace") + b"\n"
        with self._changed:
            if self._num_bytes + len(content) > _MOST_WAITING_BYTES:
                self._num_left_out += 1
                return
            self._lines.append(content)
            self._num_bytes += len(content)
            self._changed.notify()

    def close(self) -> None:
        """Write what is left, for two seconds at most."""
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).propagate = True
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(_LAST_S)
        if not self._thread.is_alive() and self._descriptor != _STDERR:
            with suppress(OSError):
                os.close(self._descriptor)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._num_bytes -= len(line)
                num_left_out, self._num_left_out = self._num_left_out, 0
            if num_left_out:
                self._tell(f"{num_left_out} lines of the log came too fast and are left out")
            try:
                self._write_all(line)
            except OSError as error:
                self._tell(f"the log cannot be written: {error.strerror or error}")

    def _write_all(self, line: bytes) -> None:
        left = line if self._is_whole else b"\n" + line
        while left:
            written = os.write(self._descriptor, left)
            left = left[written:]
            self._is_whole = not left

    def _tell(self, text: str) -> None:
        """Say on standard error, once, that lines are missing."""
        if not self._is_told:
            self._is_told = True
            with suppress(OSError):
                os.write(_STDERR, f"{text}; this is told once\n".encode())


class _Handler(logging.Handler):
    """What the server's code and uvicorn say, as lines of the log."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message, and the way to an error."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        level = record.levelname.lower()
        self._log.write({"level": level, "message": message}, f"{level}: {message}")


def open_log(settings: ServerSettings) -> Log:
    """The log that the settings name. Errors: ConfigError where its file cannot be opened."""
    path: Path | None = settings.log_file
    if path is None:
        sys.stderr.flush()
        return Log(_STDERR, settings.log_format)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return Log(os.open(path, flags, 0o600), settings.log_format)
    except OSError as error:
        told = f"--log-file {path} cannot be opened: {error.strerror or error}"
        raise ConfigError(told) from error
