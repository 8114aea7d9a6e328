"""Run a server until it is told to end."""

import asyncio
import logging
import math
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from thinslice.engine.async_engine import AsyncEngine
from thinslice.errors import ConfigError
from thinslice.serve.app import make_app
from thinslice.serve.keys import Keys
from thinslice.serve.served import Served
from thinslice.serve.settings import ServerSettings

# Connections beyond this are refused by the server at once.
_MAX_CONNECTIONS = 1024
_LAST_SECONDS = 5


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on, before a model is loaded for it.

    Errors: ConfigError where the address is taken or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(_MAX_CONNECTIONS)
    except OSError as error:
        found.close()
        place = f"{settings.host}:{settings.port}"
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot listen on {place}: {reason}; --port 0 takes one") from error
    return found


class Server(uvicorn.Server):
    """Ends in order: from the first signal on no request is taken, and answers that are under way
    may go on for some seconds; at a second one they end at once."""

    def __init__(self, app: FastAPI, engine: AsyncEngine, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                limit_concurrency=_MAX_CONNECTIONS,
                # For clients that do not read what they get.
                timeout_graceful_shutdown=math.ceil(drain_s) + _LAST_SECONDS,
                server_header=False,
                http="h11",
                ws="none",
                loop="asyncio",
            )
        )
        self._engine = engine
        self._drain_s = drain_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and wait for what is under way."""
        draining = asyncio.ensure_future(self._engine.aclose(self._drain_s))
        await super().shutdown(sockets)
        await self._engine.aclose()
        await draining


def run_server(
    served: Served, listener: socket.socket, settings: ServerSettings, keys: Keys
) -> None:
    """Answer requests until SIGINT or SIGTERM; then what is under way may end."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    # uvicorn raises the signal that ended it once more, for whoever handled it before.
    before = {one: signal.signal(one, _passed_over) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        app = make_app(served, settings, keys)
        Server(app, served.engine, settings.drain_s).run([listener])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _passed_over(_number: int, _frame: FrameType | None) -> None:
    """The server has ended as it was told to."""
