"""How a server is run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from thinslice.config import about
from thinslice.errors import ConfigError

# A name without scheme and port.
_HOST = re.compile(r"[A-Za-z0-9_.\-]+")
# Scheme, host and perhaps a port. "*" would let every page in the world in.
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class ServerSettings:
    """What a user may set.

    Attributes:
        host: Address to listen on. Only this machine can reach the default one.
        port: Port to listen on; 0 takes a free one.
        max_waiting: Requests that may wait for their turn; more are refused with status 429.
        drain_s: Seconds that answers under way may go on for once the server is told to end.
        keys: TOML file of the keys that may use the server. THINSLICE_API_KEY adds one. Without
            any, whoever reaches the server may use it.
        log_format: Form of the log's lines: text or json. Each request has a line: its id, path,
            status, times, counts of tokens and the name of its key.
        log_file: File that the log is appended to. Default: standard error.
        log_content: Log what is asked and answered too, up to 16 KiB of each.
        allow_host: Name that the server goes by, beside localhost and addresses; may be given
            several times.
        allow_origin: Origin of web pages that may use the server from a browser, as in
            https://chat.example.com; may be given several times.

    Errors: ConfigError for a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 128
    drain_s: float = 30.0
    keys: Path | None = None
    log_format: LogFormat = "text"
    log_file: Path | None = None
    log_content: bool = False
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.log_format not in get_args(LogFormat):
            told = f"log_format is {self.log_format!r:.60}; one of text, json"
            raise about("log_format", ConfigError(told))
        for name, least, most in (
            ("port", 0, 65535),
            ("max_waiting", 1, 65536),
            ("drain_s", 0, 86400),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise about(name, ConfigError(f"{name} is {value}; expected {least}..{most}"))
        for name, form, example in (
            ("allow_host", _HOST, "model.example.com"),
            ("allow_origin", _ORIGIN, "https://chat.example.com"),
        ):
            for value in getattr(self, name):
                if not form.fullmatch(value):
                    told = f"{name} is {value!r:.100}; expected one as {example}"
                    raise about(name, ConfigError(told))
