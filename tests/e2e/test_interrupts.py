"""Ctrl-C at any moment from the entry on, while libraries are still being imported."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Tells when the command line has begun: what comes before is the interpreter's own start.
START = (
    "import sys\n"
    "from thinslice.cli import app\n"
    "take = app._take_interrupts\n"
    "app._take_interrupts = lambda: (take(), print('begun', flush=True))\n"
    "app.main(sys.argv[1:])\n"
)


def begun(*arguments: str) -> "subprocess.Popen[str]":
    """A command whose entry has been reached."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5])
def test_an_interrupt_while_libraries_load_ends_at_once_and_quietly(delay_s: float) -> None:
    process = begun("doctor")
    time.sleep(delay_s)  # the moment that is tried, not a wait for anything
    has_ended = process.poll() is not None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # An interpreter at its very end has no handlers any more. Shells call that 130 too.
    assert has_ended or process.returncode in (130, -signal.SIGINT), errors
    assert errors == ""


@pytest.mark.parametrize("delay_s", [0.7, 1.6, 2.2, 2.8])
def test_a_second_interrupt_ends_at_once_and_quietly(delay_s: float, smollm2_path: Path) -> None:
    process = begun("run", "smollm2", "--ignore-eos", "Count.")
    time.sleep(delay_s)  # the moment that is tried, not a wait for anything
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # At its very end the interpreter has no handlers any more. Shells call that 130 too.
    assert process.returncode in (130, -signal.SIGINT), errors
    assert "Traceback" not in errors
    assert "ignored" not in errors
