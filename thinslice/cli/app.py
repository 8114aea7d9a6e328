"""The command line: one function per command, errors as one clear line, exit codes."""

import errno
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from thinslice import __version__
from thinslice.cli.bench import bench
from thinslice.cli.chat import chat
from thinslice.cli.compare import compare
from thinslice.cli.console import print_error
from thinslice.cli.doctor import doctor
from thinslice.cli.models import ls, pull, rm, show
from thinslice.cli.pack import pack
from thinslice.cli.plan import plan
from thinslice.cli.run import run
from thinslice.errors import ConfigError, StoreError, ThinsliceError

_HELP = """Run compact reasoning models inside a memory budget you name.

MODEL is smollm2 (embedded), a short name such as mimo or qwen3:4b (`thinslice ls --known`), \
a folder, a .gguf file, org/name[@revision] on the Hugging Face Hub, or org/name:Q4_K_M \
for one GGUF of a hub repository.
"""
_EPILOGUE = (
    "Exit codes: 0 done, 1 a bug, 2 a wrong option or name, 3 no plan fits the budget, "
    "4 a bad checkpoint, 5 a bad prompt or sampling parameter, 6 the store or the network, "
    "130 interrupted."
)
INTERRUPTED = 130
_COMMANDS: tuple[Callable[..., int | None], ...] = (
    run,
    chat,
    plan,
    pack,
    compare,
    bench,
    pull,
    ls,
    show,
    rm,
    doctor,
)


def make_app() -> App:
    """The command-line application."""
    app = App(
        name="thinslice",
        help=_HELP,
        help_epilogue=_EPILOGUE,
        version=__version__,
        default_parameter=Parameter(negative=()),
        help_format="markdown",
        result_action="return_value",
    )
    for position, command in enumerate(_COMMANDS):
        app.command(command, sort_key=position)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run a command and exit with its code."""
    # Before torch is loaded: its threads spin for milliseconds at each operation's end by default,
    # which on busy cores slows a token down tenfold and more. Measured on two cores, SmolLM2:
    # 17 against 3 tokens/s beside other work, 14 against 25 alone.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN keeps the compiled kernels of 1,024 shapes, and each number of rows is a shape: in
    # bfloat16 the process would grow for as long as it meets new ones.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(_exit_code(sys.argv[1:] if arguments is None else arguments))


def _exit_code(arguments: list[str]) -> int:
    try:
        result = make_app()(arguments, exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        surplus = " ".join(error.unused_tokens or ())
        print_error(f"unexpected: {surplus}; a text of several words goes in quotes")
        return ConfigError.exit_code
    except CycloptsError as error:
        print_error(" ".join(str(error).split()))
        return ConfigError.exit_code
    except ThinsliceError as error:
        print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print_error("cannot write the output: the disk is full")
        _discard_output()
        return StoreError.exit_code
    return result if isinstance(result, int) else 0


def _discard_output() -> None:
    """Point standard output elsewhere, so that the interpreter's last flush does not fail.

    A reader that went away, as `head` does, is no error.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
