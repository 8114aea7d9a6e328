"""thinslice serve: answer requests over HTTP."""

from dataclasses import replace
from ipaddress import ip_address
from typing import Annotated

from cyclopts import Group, Parameter

from thinslice.cli.console import note
from thinslice.cli.options import Load
from thinslice.cli.run import load_model
from thinslice.config import EngineSettings
from thinslice.errors import ConfigError
from thinslice.serve.keys import read_keys
from thinslice.serve.settings import ServerSettings

Serving = Annotated[ServerSettings, Parameter(name="*", group=Group("Serving", sort_key=0))]


def serve(
    model: str,
    /,
    *,
    server: Serving = ServerSettings(),  # noqa: B008
    sequences: int = EngineSettings.max_num_seqs,
    load: Load = EngineSettings(),  # noqa: B008
) -> int:
    """Serve a model over HTTP, with the interface of the OpenAI API.

    Args:
        model: Name of the model.
        sequences: Completions that run at once.
    """
    try:
        from thinslice.serve.served import Served
        from thinslice.serve.server import Server, listen, run_server
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is not installed: pip install 'thinslice[serve]'"
        ) from error
    from thinslice.engine.async_engine import AsyncEngine

    keys = read_keys(server.keys)
    with listen(server) as listener:
        host, port = listener.getsockname()[:2]
        if not keys and not ip_address(host).is_loopback:
            note(f"whoever reaches {host} may use this server: it has no keys, --keys names some")
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{port}"
        told = f"serving {model} at {address} , for programs at {address}/v1 ; Ctrl-C ends it"
        with load_model(model, replace(load, max_num_seqs=sequences)) as llm:
            served = Served(AsyncEngine(llm, server.max_waiting), model)
            run_server(Server(served, server, keys, lambda: note(told)), listener)
    return 0
