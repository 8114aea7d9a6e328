"""The terminal while chat holds it: no echo, typed-ahead text kept aside, restored on every exit.

The line editor (line_editor.py) reads the keys while it shows a prompt. At all other times, while
the model loads and answers, a thread here reads them, so that the terminal's own queue of 4 KiB
never fills up, behind which even Ctrl-C would be lost.
"""

import os
import select
import signal
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# Bytes. What is typed ahead beyond that is read and let go, and the user is told.
MOST_AHEAD_BYTES = 256 * 1024
# Seconds without a byte after which a paste that was under way is taken to be over: one without
# marks, and one whose end mark has not come.
_PASTE_GAP_S, _OPEN_PASTE_GAP_S = 0.05, 0.5
# What a terminal puts around a paste.
PASTE_START, PASTE_END = "\x1b[200~", "\x1b[201~"
_BRACKETED_PASTE_ON, _BRACKETED_PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"
_SHOW_CURSOR = b"\x1b[?25h"
_INTERRUPT = b"\x03"
_LFLAG = 3


class Terminal:
    """Standard input as chat's own, for as long as the context lasts.

    Ctrl-C, Ctrl-Z and Ctrl-\\ keep their signals. SIGTERM, SIGHUP and Ctrl-Z restore the terminal
    before they do what they do; after ``fg`` it is chat's again.

    Args:
        fd: the terminal's file descriptor.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ahead = bytearray()
        self._num_dropped = 0
        self._reader: threading.Thread | None = None
        self._wake: tuple[int, int] | None = None
        self._original: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Terminal":
        self._original = termios.tcgetattr(self._fd)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._handle)
        self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._leave_loading)
        self._wake = os.pipe()
        self._own()
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        self._release()
        for descriptor in self._wake or ():
            os.close(descriptor)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For a line editor: the thread leaves the keys to whoever reads them meanwhile."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def put_ahead(self, text: str) -> None:
        """Keep text as typed ahead: what a line editor has read and not used."""
        self._keep(text.encode("utf-8", "surrogateescape"))

    def take_ahead(self) -> str:
        """The keys typed ahead so far, and until a paste that is under way has ended."""
        self._stop()
        try:
            while self._is_ready(self._gap_s()) and self._read():
                pass
            data, self._ahead = bytes(self._ahead), bytearray()
        finally:
            self._start()
        return data.decode("utf-8", "ignore")

    def take_num_dropped(self) -> int:
        """How many bytes typed ahead were let go since the last call."""
        count, self._num_dropped = self._num_dropped, 0
        return count

    def _gap_s(self) -> float:
        if self._ahead.rfind(PASTE_START.encode()) > self._ahead.rfind(PASTE_END.encode()):
            return _OPEN_PASTE_GAP_S
        return _PASTE_GAP_S if self._ahead else 0.0

    def _start(self) -> None:
        if self._reader is None and self._wake is not None:
            with _interrupts_later():
                self._reader = threading.Thread(target=self._drain, daemon=True, name="keys")
                self._reader.start()

    def _stop(self) -> None:
        if self._reader is None or self._wake is None:
            return
        with _interrupts_later():
            os.write(self._wake[1], b"x")
            self._reader.join()
            os.read(self._wake[0], 1)
            self._reader = None

    def _drain(self) -> None:
        """In the thread: read until woken, or until the terminal has gone."""
        assert self._wake is not None
        while True:
            ready, _, _ = select.select([self._fd, self._wake[0]], [], [])
            if self._wake[0] in ready or not self._read():
                return

    def _is_ready(self, timeout_s: float) -> bool:
        return bool(select.select([self._fd], [], [], timeout_s)[0])

    def _read(self) -> bool:
        """Read what is there; False at the end of the terminal."""
        try:
            data = os.read(self._fd, 4096)
        except OSError:
            return False
        self._keep(data)
        return bool(data)

    def _keep(self, received: bytes) -> None:
        data = received.replace(_INTERRUPT, b"")
        room = MOST_AHEAD_BYTES - len(self._ahead)
        self._ahead += data[:room]
        self._num_dropped += max(len(data) - room, 0)
        if data != received:  # typed while an editor had the terminal, for which it is a key
            os.kill(os.getpid(), signal.SIGINT)

    def _own(self) -> None:
        """No echo and no lines; signals stay. Pastes are marked, and thus known to be whole."""
        attributes = termios.tcgetattr(self._fd)
        attributes[_LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
        # An interrupt drops no keys: a thread that had seen some would wait for others.
        attributes[_LFLAG] |= termios.ISIG | termios.NOFLSH
        termios.tcsetattr(self._fd, termios.TCSADRAIN, attributes)
        self._send(_BRACKETED_PASTE_ON)

    def _release(self) -> None:
        if self._original is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._original)
        self._send(_BRACKETED_PASTE_OFF + _SHOW_CURSOR)

    def _send(self, sequence: bytes) -> None:
        with suppress(OSError):
            os.write(self._fd, sequence)

    def loaded(self) -> None:
        """From now on Ctrl-C is a KeyboardInterrupt and nothing else: it ends no conversation."""
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _leave_loading(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C while the model loads: the command line may end the process at once."""
        self._release()
        before = self._handlers[signal.SIGINT]
        if callable(before):
            before(number, frame)

    def _handle(self, number: int, _: FrameType | None) -> None:
        """Restore the terminal, do what the signal does by default, and go on after a stop."""
        self._release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        # Here only after SIGCONT.
        signal.signal(number, self._handle)
        self._own()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """For a few lines of the main thread that hang together: Ctrl-C comes behind them."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            os.kill(os.getpid(), signal.SIGINT)
