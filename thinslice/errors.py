"""Every error thinslice raises on purpose, with the exit code the command line gives it.

A message is one clear line: what was asked, what it needs, what would work. Further lines, where
they help, are indented by the raiser. Anything else that escapes is a bug of ours.
"""

# What torch's allocator says, as a RuntimeError.
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


class ThinsliceError(Exception):
    """Base of all errors a user can cause or meet.

    Attributes:
        exit_code: what the command line ends with.
        with_options: the message in the command line's words, where it names LLM's arguments.
        setting: the field of SamplingParams or EngineSettings that the message begins with.
    """

    exit_code = 1
    with_options: str | None = None
    setting: str | None = None


class ConfigError(ThinsliceError):
    """An option, a name or a setting is wrong."""

    exit_code = 2


class BudgetError(ThinsliceError):
    """No plan fits the budget; the message names the need by part and what would fit.

    Attributes:
        to_pack: the option that lets the model be packed, where it then fits the budget; else None.
    """

    exit_code = 3
    to_pack: str | None = None


class CheckpointError(ThinsliceError):
    """A model's files are missing, damaged, dangerous or of an unsupported kind."""

    exit_code = 4


class RequestError(ThinsliceError):
    """A prompt or its sampling parameters cannot be served as asked (HTTP 400 in a server)."""

    exit_code = 5


class ContextError(RequestError):
    """A prompt leaves no room in the context for the answer that is asked for; another may."""


class BusyError(RequestError):
    """The queue of waiting requests is full, or closed, or there is no room for more at this time
    (HTTP 429 in a server)."""


class StoreError(ThinsliceError):
    """The model store cannot fetch, keep or remove a model (network, disk, a lock)."""

    exit_code = 6


class ServerError(ThinsliceError):
    """A server cannot be told to end, or does not end."""

    exit_code = 7


def plain(value: object, most: int) -> str:
    """A value from a file as a message shows it: on one line, without characters that control.

    Args:
        most: characters, of which an escape may take several.
    """
    text = str(value)[:most]
    return text if text.isprintable() else repr(text)[1:-1]


def shown(value: object) -> str:
    """A value that is not what was expected, as a message shows it: the beginning of what Python
    writes for it, on one line, or its type where Python cannot (numbers of more than 4,300
    digits)."""
    try:
        return plain(repr(value), 60)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"a {type(value).__name__} that cannot be written out"


def own_error(error: BaseException) -> ThinsliceError | None:
    """What an exception of Python's or of a library's means to the user; None for a bug of ours.

    The system's refusals only: of a file, of memory, of a thread. For the outermost places, which
    the errors reach that no room has given a closer meaning.
    """
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        what = f"{' and '.join(names)} cannot be used" if names else "the system refused a request"
        return StoreError(f"{what}: {error.strerror or str(error) or type(error).__name__}")
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return BudgetError("the system gives this process no more memory; a smaller budget may fit")
    if isinstance(error, RuntimeError) and "start new thread" in text:
        return BudgetError("the system lets this process start no more threads (see `ulimit -u`)")
    return None
