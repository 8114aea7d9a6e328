"""The commands of the command line, put together."""

import re
from collections.abc import Callable

from cyclopts import App, ArgumentCollection, Parameter

from thinslice import __version__
from thinslice.cli.bench import bench
from thinslice.cli.chat import chat
from thinslice.cli.compare import compare
from thinslice.cli.console import err, helping
from thinslice.cli.doctor import doctor
from thinslice.cli.models import ls, pull, rm, show
from thinslice.cli.pack import pack
from thinslice.cli.plan import plan
from thinslice.cli.run import run
from thinslice.errors import ConfigError

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
_WHOLE = (int, int | None, tuple[int, ...])
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


def check_whole_numbers(_app: App, _commands: tuple[str, ...], given: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number is expected, which would be rounded without a word.

    Errors: ConfigError.
    """
    for argument in given:
        if argument.hint not in _WHOLE:
            continue
        for token in argument.tokens:
            if not re.fullmatch(r"[+-]?[0-9]+", token.value):
                raise ConfigError(f"{argument.name} {token.value}: expected a whole number")


def make_app() -> App:
    """The command-line application."""
    app = App(
        name="thinslice",
        help=_HELP,
        help_epilogue=_EPILOGUE,
        version=__version__,
        console=helping,
        error_console=err,
        default_parameter=Parameter(negative=()),
        help_format="markdown",
        result_action="return_value",
        config=check_whole_numbers,
    )
    for position, command in enumerate(_COMMANDS):
        app.command(command, sort_key=position)
    return app
