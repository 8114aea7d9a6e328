"""A server of a tiny random model that runs in a thread of the tests' own process."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from tests.tiny_llm import TEMPLATE, beside, write_model
from thinslice import LLM
from thinslice.engine.async_engine import AsyncEngine
from thinslice.serve.keys import Keys
from thinslice.serve.log import open_log
from thinslice.serve.served import Served
from thinslice.serve.server import Server
from thinslice.serve.settings import ServerSettings
from thinslice.units import MIB

NAME = "tiny"


@dataclass(frozen=True)
class Running:
    """A server that answers.

    Attributes:
        port: on loopback.
    """

    served: Served
    app: FastAPI
    port: int

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def num_running(self) -> int:
        """Sequences that have not ended."""
        scheduler = self.served.engine.llm.engine.scheduler
        return len(scheduler.waiting) + len(scheduler.running)

    def wait_until_idle(self, limit_s: float = 20.0) -> None:
        """Until nothing runs. Errors: AssertionError where something still does."""
        until = time.monotonic() + limit_s
        while self.num_running():
            assert time.monotonic() < until, "sequences run on"
            time.sleep(0.005)


@contextmanager
def running(
    folder: Path,
    settings: ServerSettings | None = None,
    keys: Keys | None = None,
    template: str = TEMPLATE,
    **loading: Any,
) -> Iterator[Running]:
    """A server of a model that runs four sequences of 512 tokens at once."""
    path = write_model(folder / "tiny.gguf", template)
    with serving(path, settings, keys, **loading) as found:
        yield found


@contextmanager
def serving(
    path: Path,
    settings: ServerSettings | None = None,
    keys: Keys | None = None,
    **loading: Any,
) -> Iterator[Running]:
    """A server of a model that runs four sequences at once."""
    settings = settings or ServerSettings(drain_s=0.0)
    with LLM(str(path), memory=beside(64 * MIB), max_num_seqs=4, draft="off", **loading) as llm:
        served = Served(AsyncEngine(llm, settings.max_waiting), NAME)
        # The path of a log that nobody asked for.
        silent = replace(settings, log_file=settings.log_file or Path(os.devnull))
        with open_log(silent) as log, socket.create_server(("127.0.0.1", 0)) as listener:
            log.start()
            server = Server(served, settings, keys or Keys(), log)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                while not server.started:
                    assert thread.is_alive(), "the server did not start"
                    time.sleep(0.01)
                yield Running(served, server.app, listener.getsockname()[1])
            finally:
                server.should_exit = True
                thread.join()
