"""Run a server until it is told to end."""

import asyncio
import errno
import logging
import math
import signal
import socket
from collections.abc import Callable

import uvicorn

from thinslice.errors import ConfigError
from thinslice.serve.app import make_app
from thinslice.serve.connection import bounded, connections_for
from thinslice.serve.keys import Keys
from thinslice.serve.log import Log
from thinslice.serve.request_log import RequestLog
from thinslice.serve.served import Served
from thinslice.serve.settings import ServerSettings

_BACKLOG = 128
_LAST_SECONDS = 5
_ENDING = (signal.SIGINT, signal.SIGTERM)


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on, before a model is loaded for it.

    Errors: ConfigError where the address is taken or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        place, reason = f"{settings.host}:{settings.port}", error.strerror or str(error)
        hint = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {place}: {reason}{hint}") from error
    return found


class Server(uvicorn.Server):
    """Ends in order: from the first signal on no request is taken, and answers that are under way
    may go on for some seconds; at a second one they end at once.

    Args:
        on_ready: called once requests are taken.
    """

    def __init__(
        self,
        served: Served,
        settings: ServerSettings,
        keys: Keys,
        log: Log,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.app = make_app(served, settings, keys)
        super().__init__(
            uvicorn.Config(
                RequestLog(self.app, log, has_content=settings.log_content),
                log_config=None,
                access_log=False,
                lifespan="on",
                **bounded(_num_connections(served, settings)),
                # For clients that do not read what they get.
                timeout_graceful_shutdown=math.ceil(settings.drain_s) + _LAST_SECONDS,
                server_header=False,
                ws="none",
                loop="asyncio",
            )
        )
        self._engine = served.engine
        self._drain_s = settings.drain_s
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests, and tell so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for what is under way."""
        draining = asyncio.ensure_future(self._engine.aclose(self._drain_s))
        await super().shutdown(sockets)
        await self._engine.aclose()
        await draining


def _num_connections(served: Served, settings: ServerSettings) -> int:
    return connections_for(settings.max_waiting + served.engine.llm.plan.max_num_seqs)


def run_server(server: Server, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM; then what is under way may end."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # One that comes before uvicorn looks counts too. It raises the signal that ended it once more,
    # for whoever handled it before.
    before = {one: signal.signal(one, server.handle_exit) for one in _ENDING}
    try:
        server.run([listener])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
