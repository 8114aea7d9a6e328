"""Every error thinslice raises on purpose, with the exit code the command line gives it.

A message is one clear line: what was asked, what it needs, what would work. Further lines, where
they help, are indented by the raiser. Anything else that escapes is a bug of ours.
"""


class ThinsliceError(Exception):
    """Base of all errors a user can cause or meet."""

    exit_code = 1


class ConfigError(ThinsliceError):
    """An option, a name or a setting is wrong."""

    exit_code = 2


class BudgetError(ThinsliceError):
    """No plan fits the budget; the message names the need by part and what would fit."""

    exit_code = 3


class CheckpointError(ThinsliceError):
    """A model's files are missing, damaged, dangerous or of an unsupported kind."""

    exit_code = 4


class RequestError(ThinsliceError):
    """A prompt or its sampling parameters cannot be served as asked (HTTP 400 in a server)."""

    exit_code = 5


class BusyError(RequestError):
    """The queue of waiting requests is full, or closed (HTTP 503 in a server)."""


class StoreError(ThinsliceError):
    """The model store cannot fetch, keep or remove a model (network, disk, a lock)."""

    exit_code = 6
