"""thinslice pull, ls, show and rm: the models on this disk."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from thinslice.cli.console import note, plain_table, print_json, print_table, progress_bars
from thinslice.cli.options import Json
from thinslice.store.known_models import KNOWN
from thinslice.store.manifest import StoredModel
from thinslice.store.packed_copies import PackedCopy
from thinslice.store.store import Store
from thinslice.units import format_bytes


def pull(model: str, /, *, offline: bool = False) -> None:
    """Fetch a model into the store; an interrupted pull goes on where it stopped.

    Args:
        model: Name of the model.
        offline: Use no network: succeed only where the model is stored already.
    """
    with progress_bars() as progress:
        stored = Store().pull(model, progress, offline=offline)
    note(f"{stored.name}: {format_bytes(stored.num_bytes)} in {stored.path}")


def ls(*, known: bool = False, as_json: Json = False) -> None:
    """List the stored models and their packed copies.

    Args:
        known: List the short names of published models instead, stored or not.
        as_json: Print one JSON object instead of the table.
    """
    if known:
        _list_known(as_json)
        return
    store = Store()
    models, unfinished, packed = store.list(), store.unfinished(), store.packed()
    if as_json:
        print_json(
            {
                "models": [as_record(model) for model in models],
                "unfinished": [asdict(pull) for pull in unfinished],
                "packed": [asdict(copy) | {"path": str(copy.path)} for copy in packed],
            }
        )
        return
    if not models and not unfinished and not packed:
        note(f"no models in {store.root}; thinslice pull smollm2 fetches one")
        return
    table = plain_table("NAME", "SIZE", "CONTEXT", "LICENCE", "ARCHITECTURE")
    for model in models:
        row = (model.name, format_bytes(model.num_bytes), str(model.context_length))
        table.add_row(*row, model.licence or "unknown", model.architecture)
        _add_copies(table, [copy for copy in packed if copy.model == model.name])
    for pull in unfinished:
        table.add_row(pull.name, format_bytes(pull.num_bytes), "", "", "unfinished pull")
    names = {model.name for model in models}
    _add_copies(table, [copy for copy in packed if copy.model not in names])
    print_table(table)


def _list_known(as_json: bool) -> None:
    if as_json:
        print_json({"known": {name: asdict(model) for name, model in KNOWN.items()}})
        return
    table = plain_table("NAME", "PARAMETERS", "LICENCE", "REPOSITORY")
    for name, model in KNOWN.items():
        table.add_row(name, model.parameters, model.licence, model.repo_id)
    print_table(table)


def _add_copies(table: Table, copies: list[PackedCopy]) -> None:
    for copy in copies:
        kind = f"{copy.format} copy" if copy.is_whole else "unfinished packing"
        table.add_row(copy.name, format_bytes(copy.num_bytes), "", "", kind)


def show(model: str, /, *, as_json: Json = False) -> None:
    """Show what is known of a model: source, licence, context length, sizes and digests.

    Args:
        model: Name of the model.
        as_json: Print one JSON object instead of the table.
    """
    stored = Store().show(model)
    # A path has no copy of that name, and needs no store.
    copies = [] if stored.pulled_at is None else Store().packed()
    copies = [copy for copy in copies if copy.model == stored.name]
    if as_json:
        packed = [asdict(copy) | {"path": str(copy.path)} for copy in copies]
        print_json({**as_record(stored), "packed": packed})
        return
    table = plain_table()
    table.add_row("name", stored.name)
    table.add_row("architecture", stored.architecture)
    if stored.weights is not None:
        table.add_row("weights", stored.weights)
    table.add_row("context length", f"{stored.context_length} tokens")
    table.add_row("licence", stored.licence or "unknown")
    table.add_row("source", stored.source)
    if stored.revision is not None:
        table.add_row("revision", stored.revision)
    if stored.pulled_at is not None:
        table.add_row("pulled", stored.pulled_at)
    table.add_row("path", str(stored.path))
    table.add_row("size", format_bytes(stored.num_bytes))
    for copy in copies:
        table.add_row(f"{copy.format} copy", f"{copy.name}  {format_bytes(copy.num_bytes)}")
    for file in stored.files:
        digest = f"sha256 {file.sha256}" if file.sha256 else ""
        table.add_row("file", f"{file.path}  {format_bytes(file.num_bytes)}  {digest}".rstrip())
    print_table(table)


def rm(model: str, /) -> None:
    """Remove a model with its packed copies, one such copy, or what an unfinished pull has left.

    Args:
        model: Name of the model.
    """
    num_bytes = Store().remove(model)
    note(f"removed {model}: {format_bytes(num_bytes)} free again")


def as_record(model: StoredModel) -> dict[str, Any]:
    """A stored model for ``--json``."""
    return {**asdict(model), "path": str(model.path), "num_bytes": model.num_bytes}
