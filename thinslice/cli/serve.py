"""thinslice serve: answer requests over HTTP."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from typing import Annotated

from cyclopts import Group, Parameter

from thinslice.cli.console import note
from thinslice.cli.open_page import open_page, page_address
from thinslice.cli.options import LoadToServe
from thinslice.cli.run import load_model
from thinslice.config import EngineSettings
from thinslice.errors import ConfigError, StoreError
from thinslice.plan.memory_plan import MemoryPlan
from thinslice.serve.keys import read_keys
from thinslice.serve.settings import ServerSettings
from thinslice.serve.state import ServerState, own_state, remove_state, states_folder, write_state
from thinslice.units import format_bytes

Serving = Annotated[ServerSettings, Parameter(name="*", group=Group("Serving", sort_key=0))]


def serve(
    model: str,
    /,
    *,
    server: Serving = ServerSettings(),  # noqa: B008
    sequences: int = EngineSettings.max_num_seqs,
    open_in_browser: Annotated[bool, Parameter(name="--open", negative="")] = False,
    load: LoadToServe = EngineSettings(),  # noqa: B008
) -> int:
    """Serve a model over HTTP, with the interface of the OpenAI API.

    Args:
        model: Name of the model.
        sequences: Completions that run at once.
        open_in_browser: Open the chat page in your browser once the server is ready.
    """
    try:
        from thinslice.serve.log import open_log
        from thinslice.serve.room import with_room
        from thinslice.serve.served import Served
        from thinslice.serve.server import Server, listen, run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is not installed: pip install 'thinslice[serve]'"
        ) from error
    from thinslice.engine.async_engine import AsyncEngine

    keys = read_keys(server.keys)
    with open_log(server) as log, listen(server) as listener:
        log.start()
        host, port = listener.getsockname()[:2]
        if not keys and not ip_address(host).is_loopback:
            note(f"whoever reaches {host} may use this server: it has no keys, --keys names some")
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{port}"
        told = f"serving {model} at {address} , for programs at {address}/v1 ; Ctrl-C ends it"
        settings = with_room(replace(load, max_num_seqs=sequences), server)
        with load_model(model, settings) as llm, ExitStack() as ends:
            served = Served(AsyncEngine(llm, server.max_waiting), model)

            def on_ready() -> None:
                budget = llm.plan.host.budget_bytes
                _show_to_ps(ends, lambda: own_state((host, port), model, budget, server.drain_s))
                note(_what_fits(llm.plan))
                note(told)
                if open_in_browser:
                    open_page(page_address(host, port))

            run_server(Server(served, server, keys, log, on_ready), listener)
    return 0


def _show_to_ps(ends: ExitStack, state: Callable[[], ServerState]) -> None:
    """Have ``thinslice ps`` find this server until the end."""
    try:
        ends.callback(remove_state, write_state(state(), states_folder(os.environ)))
    except StoreError as error:
        note(f"thinslice ps and stop will not find this server: {error}")


def _what_fits(plan: MemoryPlan) -> str:
    """What clients can ask for, in a line."""
    place = "in memory" if plan.streaming is None else "streamed from disk at each step"
    budget = format_bytes(plan.host.budget_bytes)
    return (
        f"in {budget}: a context of {plan.context} tokens, {plan.num_kv_blocks * plan.block_size} "
        f"for all of {plan.max_num_seqs} at a time, weights {place}"
    )
