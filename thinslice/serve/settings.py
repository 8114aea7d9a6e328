"""How a server is run."""

import re
from dataclasses import dataclass
from pathlib import Path

from thinslice.config import about
from thinslice.errors import ConfigError

# Scheme, host and perhaps a port. "*" would let every page in the world in.
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")


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
        allow_host: Name that the server goes by, beside localhost and addresses; may be given
            several times.
        allow_origin: Origin of web pages that may use the server from a browser, as in
            https://chat.example.com; may be given several times.

    Errors: ConfigError for a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_waiting: int = 256
    drain_s: float = 30.0
    keys: Path | None = None
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65535),
            ("max_waiting", 1, 65536),
            ("drain_s", 0, 86400),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise about(name, ConfigError(f"{name} is {value}; expected {least}..{most}"))
        for origin in self.allow_origin:
            if not _ORIGIN.fullmatch(origin):
                told = f"allow_origin is {origin!r:.100}; expected one as https://chat.example.com"
                raise about("allow_origin", ConfigError(told))
