"""The command line's entry: errors as one clear line, exit codes, Ctrl-C from the first moment on.

What takes long to import is imported by ``main``, once Ctrl-C is taken care of.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130
_SHOW_CURSOR = b"\x1b[?25h"


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before or behind the place that ends a command in order
        code = INTERRUPTED
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    _take_interrupts()
    # Read when NumPy is imported. No product here is OpenBLAS's, whose threads would be started,
    # and spin, while everything else is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from thinslice.process import without_collections

    with without_collections(stays=True):
        from thinslice.cli.exit_codes import run_command

    code = run_command(arguments)
    if signal.getsignal(signal.SIGINT) in (_interrupt, signal.default_int_handler):
        # What is left is the interpreter's own end, which an exception would only confuse.
        signal.signal(signal.SIGINT, _leave)
    return code


def _take_interrupts() -> None:
    """Answer Ctrl-C ourselves, unless whoever started the process has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End a command in order, by KeyboardInterrupt; end an import at once, and whatever is left at
    a second one.

    A library that is interrupted while it is imported may swallow the exception, or take it for
    an error of its own. Nothing is half-written at that time.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _leave(number, frame)
        frame = frame.f_back
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    if os.isatty(2):  # a progress bar may have hidden the cursor
        os.write(2, _SHOW_CURSOR)
    os._exit(INTERRUPTED)
