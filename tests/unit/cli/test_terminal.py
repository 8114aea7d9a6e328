"""A terminal whose keys are kept, and which is restored."""

import itertools
import os
import pty
import signal
import sys
import termios
from types import FrameType
from typing import Any

import pytest

from thinslice.cli.terminal import MOST_AHEAD_BYTES, Terminal

_LFLAG = 3


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data[:512]) :]


def test_the_terminal_is_owned_drained_and_restored() -> None:
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with Terminal(terminal) as owned:
        flags = termios.tcgetattr(terminal)[_LFLAG]
        assert not flags & (termios.ECHO | termios.ICANON)
        assert flags & termios.ISIG
        # More than the terminal's queue holds: this would block if nobody read.
        write_all(user, b"word " * 4000)
        assert owned.take_ahead() == "word " * 4000
        assert owned.take_ahead() == ""
        write_all(user, b"x" * (MOST_AHEAD_BYTES + 100))
        assert len(owned.take_ahead()) == MOST_AHEAD_BYTES
        assert owned.take_num_dropped() == 100
        with owned.lent():
            os.write(user, b"k")
            assert os.read(terminal, 10) == b"k"
        owned.put_ahead("again")
        assert owned.take_ahead() == "again"
    assert termios.tcgetattr(terminal) == before
    os.close(user)
    os.close(terminal)


def test_an_interrupt_drops_no_keys() -> None:
    user, terminal = pty.openpty()
    with Terminal(terminal) as owned:
        with owned.lent():  # nobody reads
            os.write(user, b"typed\x03")
        assert owned.take_ahead() == "typed"
    os.close(user)
    os.close(terminal)


def test_an_interrupt_that_an_editor_took_for_a_key_is_one() -> None:
    user, terminal = pty.openpty()
    with Terminal(terminal) as owned:
        owned.loaded()
        with pytest.raises(KeyboardInterrupt):
            owned.put_ahead("ahead\x03")
        assert owned.take_ahead() == "ahead"
    os.close(user)
    os.close(terminal)


def test_an_interrupt_at_any_line_leaves_the_terminal_usable() -> None:
    """Also where its thread is being started or stopped."""
    for count in itertools.count(1):
        user, terminal = pty.openpty()
        left = count

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename != Terminal.__init__.__code__.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGINT)
            return trace

        with Terminal(terminal) as owned:
            owned.loaded()
            before, was_interrupted = sys.gettrace(), False
            sys.settrace(trace)
            try:
                with owned.lent():
                    pass
                owned.take_ahead()
            except KeyboardInterrupt:
                was_interrupted = True
            finally:
                sys.settrace(before)
            assert was_interrupted == (left <= 0)
            with owned.lent():
                os.write(user, b"k")
                assert os.read(terminal, 10) == b"k"
            write_all(user, b"word " * 4000)
            assert owned.take_ahead() == "word " * 4000
        os.close(user)
        os.close(terminal)
        if left > 0:
            break
    assert count > 30


def test_the_terminal_is_restored_after_an_error() -> None:
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    with pytest.raises(ZeroDivisionError), Terminal(terminal):
        raise ZeroDivisionError
    assert termios.tcgetattr(terminal) == before
    os.close(user)
    os.close(terminal)


def test_a_stop_gives_the_terminal_back_first_and_takes_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    seen: list[tuple[int, bool, object]] = []

    def stop(_: int, number: int) -> None:
        is_restored = termios.tcgetattr(terminal) == before
        seen.append((number, is_restored, signal.getsignal(number)))

    with Terminal(terminal):
        monkeypatch.setattr("thinslice.cli.terminal.os.kill", stop)
        signal.raise_signal(signal.SIGTSTP)
        assert seen == [(signal.SIGTSTP, True, signal.SIG_DFL)]
        assert not termios.tcgetattr(terminal)[_LFLAG] & termios.ECHO
        signal.raise_signal(signal.SIGTSTP)
        assert len(seen) == 2
    assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
    os.close(user)
    os.close(terminal)


def test_ctrl_c_restores_the_terminal_while_the_model_loads_and_only_interrupts_afterwards() -> (
    None
):
    user, terminal = pty.openpty()
    before = termios.tcgetattr(terminal)
    seen: list[bool] = []
    previous = signal.signal(
        signal.SIGINT, lambda *_: seen.append(termios.tcgetattr(terminal) == before)
    )
    try:
        with Terminal(terminal) as owned:
            signal.raise_signal(signal.SIGINT)
            assert seen == [True]
            owned.loaded()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert seen == [True, True]
    finally:
        signal.signal(signal.SIGINT, previous)
    os.close(user)
    os.close(terminal)


def test_a_terminal_that_goes_away_ends_the_reading() -> None:
    user, terminal = pty.openpty()
    with Terminal(terminal) as owned:
        os.write(user, b"last words")
        os.close(user)
        assert owned.take_ahead() in ("last words", "")
        assert owned.take_ahead() == ""
    os.close(terminal)
