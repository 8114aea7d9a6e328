"""Run a command: whatever ends it becomes one clear line and an exit code."""

import os
import sys
import traceback
from io import TextIOWrapper
from pathlib import Path

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

from thinslice.cli.app import INTERRUPTED
from thinslice.cli.commands import make_app
from thinslice.cli.console import ReaderGoneError, err, out, print_error
from thinslice.cli.prompt import PIPED
from thinslice.errors import ConfigError, ThinsliceError, own_error

_BUG = 1
# Options that are not called as the settings are.
_OTHER_OPTIONS = {"max_num_seqs": "sequences"}


def run_command(arguments: list[str]) -> int:
    """Run the command that the arguments name and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = _run(arguments)
        out.file.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except ReaderGoneError:
        code = 0
    except ThinsliceError as error:
        code = _report(error)
    except Exception as error:  # noqa: BLE001  # the one place where a bug of ours ends
        known = own_error(error)
        code = _BUG if known is None else _report(known)
        if known is None:
            err.file.write(traceback.format_exc())
            print_error(f"this is a bug of thinslice: {type(error).__name__}: {error}")
    _discard_output()
    return code


def _run(arguments: list[str]) -> int:
    try:
        result = make_app()(_input_last(arguments), exit_on_error=False, print_error=False)
    except UnusedCliTokensError as error:
        surplus = " ".join(error.unused_tokens or ())
        command = " ".join(("thinslice", *(error.command_chain or ())))
        told = f"unexpected: {surplus}; `{command} --help` shows what it takes"
        raise ConfigError(told) from error
    except MissingArgumentError as error:
        raise ConfigError(_missing(error, arguments)) from error
    except UnknownOptionError as error:
        hint = " (a prompt that begins with - goes behind --)"
        told = " ".join(str(error).split())
        raise ConfigError(told + hint * (arguments[0] == "run")) from error
    except CycloptsError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return result if isinstance(result, int) else 0


def _missing(error: MissingArgumentError, arguments: list[str]) -> str:
    """What was not given: a value, or an argument altogether."""
    assert error.argument is not None, "an argument that is missing has a name"
    name, choices = error.argument.name, error.argument.get_choices() or ()
    hint = f": {' or '.join(choices)}" if choices else ""
    if name in arguments:
        behind = arguments[arguments.index(name) + 1 :][:1]
        if behind == [PIPED] and error.argument.hint in (Path, Path | None, tuple[Path, ...]):
            return f"{name} -: standard input is written {name} /dev/stdin"
        if behind and not behind[0].startswith("--"):
            meant = f"{name}={behind[0]}"
            return f"{name} {behind[0]}: a value that begins with - is written {meant}{hint}"
        return f"{name} needs a value{hint}"
    return f"thinslice {' '.join(error.command_chain or ())} needs {name}{hint}"


def _input_last(arguments: list[str]) -> list[str]:
    """The arguments with a lone ``-`` behind ``--``: cyclopts takes it for an option elsewhere."""
    if PIPED not in arguments or "--" in arguments:
        return arguments
    others = [argument for argument in arguments if argument != PIPED]
    return [*others, "--", *[PIPED] * (len(arguments) - len(others))]


def _report(error: ThinsliceError) -> int:
    text = error.with_options or str(error)
    if error.setting is not None and text.startswith(error.setting):
        option = _OTHER_OPTIONS.get(error.setting, error.setting.replace("_", "-"))
        text = f"--{option}{text.removeprefix(error.setting)}"
    print_error(text)
    return error.exit_code


def _discard_output() -> None:
    """Point what cannot be written elsewhere, so that the interpreter's last flush is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
