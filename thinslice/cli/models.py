"""thinslice pull, ls, show and rm: the models on this disk."""

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from thinslice.cli.console import note, out, progress_bars
from thinslice.cli.options import Json
from thinslice.store.manifest import StoredModel
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


def ls(*, as_json: Json = False) -> None:
    """List the stored models.

    Args:
        as_json: Print one JSON object instead of the table.
    """
    store = Store()
    models, unfinished = store.list(), store.unfinished()
    if as_json:
        print_json(
            {
                "models": [as_record(model) for model in models],
                "unfinished": [asdict(pull) for pull in unfinished],
            }
        )
        return
    if not models and not unfinished:
        note(f"no models in {store.root}; thinslice pull smollm2 fetches one")
        return
    table = plain_table("NAME", "SIZE", "CONTEXT", "LICENCE", "ARCHITECTURE")
    for model in models:
        row = (model.name, format_bytes(model.num_bytes), str(model.context_length))
        table.add_row(*row, model.licence or "unknown", model.architecture)
    for pull in unfinished:
        table.add_row(pull.name, format_bytes(pull.num_bytes), "", "", "unfinished pull")
    out.print(table)


def show(model: str, /, *, as_json: Json = False) -> None:
    """Show what is known of a model: source, licence, context length, sizes and digests.

    Args:
        model: Name of the model.
        as_json: Print one JSON object instead of the table.
    """
    stored = Store().show(model)
    if as_json:
        print_json(as_record(stored))
        return
    table = plain_table()
    table.add_row("name", stored.name)
    table.add_row("architecture", stored.architecture)
    table.add_row("context length", f"{stored.context_length} tokens")
    table.add_row("licence", stored.licence or "unknown")
    table.add_row("source", stored.source)
    if stored.revision is not None:
        table.add_row("revision", stored.revision)
    if stored.pulled_at is not None:
        table.add_row("pulled", stored.pulled_at)
    table.add_row("path", str(stored.path))
    table.add_row("size", format_bytes(stored.num_bytes))
    for file in stored.files:
        digest = f"sha256 {file.sha256}" if file.sha256 else ""
        table.add_row("file", f"{file.path}  {format_bytes(file.num_bytes)}  {digest}".rstrip())
    out.print(table)


def rm(model: str, /) -> None:
    """Remove a model, or what an unfinished pull has left.

    Args:
        model: Name of the model.
    """
    num_bytes = Store().remove(model)
    note(f"removed {model}: {format_bytes(num_bytes)} free again")


def as_record(model: StoredModel) -> dict[str, Any]:
    """A stored model for ``--json``."""
    return {**asdict(model), "path": str(model.path), "num_bytes": model.num_bytes}


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    print(json.dumps(record, ensure_ascii=False))


def plain_table(*headings: str) -> Table:
    """A table without lines, that wraps nothing: it can be read by eye and cut by column."""
    table = Table(*headings, box=None, show_header=bool(headings), pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    return table
