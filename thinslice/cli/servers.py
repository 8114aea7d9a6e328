"""thinslice ps and stop: the servers that run on this machine."""

import os
import time
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from thinslice.cli.console import (
    note,
    note_all,
    plain_table,
    print_error,
    print_json,
    print_table,
    progress_bars,
)
from thinslice.cli.options import Json
from thinslice.errors import ConfigError, ServerError
from thinslice.serve.state import (
    ServerState,
    find_servers,
    memory_of,
    states_folder,
    tell_to_end,
    wait_for_end,
)
from thinslice.units import format_bytes

# Seconds beyond those that answers under way may go on for.
_MORE_S = 15.0


def ps(*, as_json: Json = False) -> None:
    """List the servers that run on this machine, and what they hold.

    Args:
        as_json: Print one JSON object instead of the table.
    """
    servers = _servers()
    if as_json:
        print_json({"servers": [_record(state) for state in servers]})
        return
    if not servers:
        note("no server runs; thinslice serve MODEL starts one")
        return
    table = plain_table("NAME", "ADDRESS", "PROCESS", "MEMORY", "PEAK", "BUDGET", "SINCE")
    for state in servers:
        now, peak = memory_of(state)
        table.add_row(
            state.model,
            state.address,
            str(state.pid),
            format_bytes(now),
            format_bytes(peak),
            format_bytes(state.budget_bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(state.started_at)),
        )
    print_table(table)


def stop(
    server: str | None = None, /, *, every: Annotated[bool, Parameter(name="--all")] = False
) -> int:
    """Tell servers to end, and wait until they have.

    They take no more requests, and answers under way may go on for as long as --drain-s says.

    Args:
        server: Name of the model that it serves, or its port. Not needed where one server runs.
        every: Stop all servers.
    """
    ending, code = [], 0
    for state in _chosen(_servers(), server, every):
        try:
            ending.append((state, tell_to_end(state)))
        except ServerError as error:
            print_error(str(error))
            code = error.exit_code
    for state, descriptor in ending:
        if descriptor is None or _waited(state, descriptor):
            note(f"stopped {state.model} at {state.address}, process {state.pid}")
        else:
            print_error(
                f"{state.model} at {state.address} has not ended in {_limit_s(state):.0f} seconds; "
                f"kill -9 {state.pid} ends it at once"
            )
            code = ServerError.exit_code
    return code


def _servers() -> list[ServerState]:
    """Those that run; what is wrong with files is told."""
    found = find_servers(states_folder(os.environ))
    note_all(found.troubles)
    return found.servers


def _record(state: ServerState) -> dict[str, object]:
    now, peak = memory_of(state)
    told = {**asdict(state), "address": state.address, "rss_bytes": now, "peak_bytes": peak}
    return {name: value for name, value in told.items() if name not in ("start", "place")}


def _chosen(servers: list[ServerState], asked: str | None, every: bool) -> list[ServerState]:
    """Errors: ConfigError where it is not clear which is meant, or none is there."""
    if every:
        if asked is not None:
            raise ConfigError("--all stops every server; name one, or say --all")
        if not servers:
            note("no server runs")
        return servers
    if not servers:
        raise ConfigError("no server runs")
    named = [one for one in servers if asked is None or asked in (one.model, str(one.port))]
    running = ", ".join(f"{one.model} at {one.address}" for one in named or servers)
    if not named:
        raise ConfigError(f"no server is called {asked!r:.100}; there is {running}")
    if len(named) > 1:
        raise ConfigError(f"several servers run: {running}; name a port, or say --all")
    return named


def _limit_s(state: ServerState) -> float:
    return state.drain_s + _MORE_S


def _waited(state: ServerState, descriptor: int) -> bool:
    """Wait for a server's end with a bar. Whether it came."""
    limit_s = _limit_s(state)
    with progress_bars("seconds") as progress:
        return wait_for_end(
            descriptor,
            limit_s,
            lambda passed: progress(f"{state.model} ends", int(passed), int(limit_s)),
        )
