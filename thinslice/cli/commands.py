"""The commands of the command line, put together."""

import re

from cyclopts import App, ArgumentCollection, Parameter

from thinslice import __version__
from thinslice.cli.console import err, helping
from thinslice.errors import ConfigError

_HELP = """Run compact reasoning models inside a memory budget you name.

MODEL is smollm2 (embedded), a short name such as mimo or qwen3:4b (`thinslice ls --known`), \
a folder, a .gguf file, org/name[@revision] on the Hugging Face Hub, or org/name:Q4_K_M \
for one GGUF of a hub repository.
"""
_EPILOGUE = (
    "Exit codes: 0 done, 1 a bug, 2 a wrong option or name, 3 no plan fits the budget, "
    "4 a bad checkpoint, 5 a bad prompt or sampling parameter, 6 the store or the network, "
    "7 a server that cannot be stopped, 130 interrupted."
)
_WHOLE = (int, int | None, tuple[int, ...])
# Of each command the module and the line of the help, which is the first of its docstring: it is
# imported when it is called.
_COMMANDS = {
    "run": ("run", "Answer one prompt, streaming, or with --prompts all prompts of a file."),
    "chat": ("chat", "Hold a conversation; /help lists its commands."),
    "serve": ("serve", "Serve a model over HTTP, with the interface of the OpenAI API."),
    "ps": ("servers", "List the servers that run on this machine, and what they hold."),
    "stop": ("servers", "Tell servers to end, and wait until they have."),
    "plan": (
        "plan",
        "Show what a model would take within a budget and how fast it would be, and what other "
        "settings would give.",
    ),
    "pack": ("pack", "Quantise a model once, into a folder that runs as it lies on disk."),
    "compare": ("compare", "Measure one version of a model against another on a text."),
    "bench": ("bench", "Measure prefill, decode and memory on prompts of random tokens."),
    "pull": (
        "models",
        "Fetch a model into the store; an interrupted pull goes on where it stopped.",
    ),
    "ls": ("models", "List the stored models and their packed copies."),
    "show": (
        "models",
        "Show what is known of a model: source, licence, context length, sizes and digests.",
    ),
    "rm": (
        "models",
        "Remove a model with its packed copies, one such copy, or what an unfinished pull has "
        "left.",
    ),
    "doctor": (
        "doctor",
        "Tell what this machine has and whether thinslice will work; exit code 1 where it will "
        "not.",
    ),
}


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
    for position, (name, (module, told)) in enumerate(_COMMANDS.items()):
        app.command(f"thinslice.cli.{module}:{name}", help=told, sort_key=position)
    return app
