"""thinslice pack: quantise a model once, into a folder of its own."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from thinslice.cli.console import note, note_all, progress_bars
from thinslice.errors import CheckpointError
from thinslice.units import format_bytes, gib, parse_bytes

if TYPE_CHECKING:
    from thinslice.checkpoint.index import Checkpoint


def pack(
    model: str,
    /,
    *,
    dtype: Literal["int4", "int8"],
    out: Path,
    memory: Annotated[str | None, Parameter(name="--memory")] = None,
    offline: bool = False,
) -> None:
    """Quantise a model once, into a folder that runs as it lies on disk.

    A packing that is broken off goes on where it stopped.

    Args:
        model: Name of the model.
        dtype: Of the layers' matrices: 4.5 or 8.5 bits a weight. Codes that a GGUF has already are
            kept: Q4_0, Q4_1 and Q4_K in int4, Q8_0 in int8. The head is int8 where it was floats.
        out: The folder to make.
        memory: The budget: the most the whole process may hold, as 4GiB or 4GB.
        offline: Use no network: only a model that is here already is found.
    """
    from thinslice.checkpoint.open import open_checkpoint
    from thinslice.memory.meter import peak_rss_bytes
    from thinslice.pack.pack import PackOptions, pack_model
    from thinslice.plan.available import check_bound
    from thinslice.plan.packed_format import PackedFormat
    from thinslice.store.store import Store

    memory_bytes = None if memory is None else parse_bytes(memory)
    if memory_bytes is not None:
        check_bound(memory_bytes)
    started = time.monotonic()
    with progress_bars() as progress:
        path = Store().ensure(model, progress, offline=offline)
        source = open_checkpoint(path)
        options = PackOptions(PackedFormat(dtype), source_name(model, path), memory_bytes)
        packed = pack_model(source, out, options, progress)
    note_all(source.notes)
    # The budget counts the tokenizer of a GGUF, which packing reads; a folder's is only copied.
    if source.kind == "gguf" or memory_bytes is None:
        note_all(_tokenizer_notes(source))
    if packed.was_there:
        note(f"{out} holds this model as {dtype} already")
        return
    sizes = f"{format_bytes(packed.record.num_bytes)} from {format_bytes(source.num_bytes)}"
    seconds = time.monotonic() - started
    note(f"{out}: {dtype}, {sizes} in {seconds:.0f} s, peak {gib(peak_rss_bytes())} GiB")


def _tokenizer_notes(source: "Checkpoint") -> tuple[str, ...]:
    """What there is to know of the tokenizer; why there is none, which packing does not mind."""
    from thinslice.text.tokenizer import load_tokenizer

    try:
        return load_tokenizer(source).notes
    except CheckpointError as error:
        return (str(error),)


def source_name(model: str, path: Path) -> str:
    """The model's name; of a path its last part alone, for the rest is nobody else's business."""
    return path.resolve().name if os.path.exists(os.path.expanduser(model)) else model
