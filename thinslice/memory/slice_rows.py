"""The rows of a slice, read from disk into what they are kept as, and those of an embedding."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.pack_rows import pack_rows
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.kernels.dtypes import FLOAT_DTYPES
from thinslice.kernels.packed import PackedWeight, unpack_rows
from thinslice.kernels.torch_ops import Rows
from thinslice.memory.slice_schedule import Slice
from thinslice.plan.packed_format import PANEL_ROWS, PackedFormat
from thinslice.plan.weight_layout import Matrix, WeightLayout, WeightSlice
from thinslice.units import MIB

_MAKE_KV = ("k_proj.weight", "v_proj.weight")
# What is converted at a time while slices are read that stay in memory.
_CONVERTED_AT_ONCE = MIB


@dataclass(frozen=True)
class PlacedSlice:
    """A slice and, where it stays, its rows; None for one that is streamed."""

    one: WeightSlice
    rows: Rows | None


def stored_name(name: str, placed: Collection[str]) -> str:
    """The name a matrix is stored under: a tied head is the embedding table."""
    is_tied_head = name == "lm_head.weight" and name not in placed
    return "model.embed_tokens.weight" if is_tied_head else name


def slice_on_disk(checkpoint: Checkpoint, one: WeightSlice) -> Slice:
    """Where the stored bytes of a slice lie."""
    entry = checkpoint.tensors[one.matrix.name]
    offset = entry.offset + one.matrix.stored_bytes(one.start)
    return Slice(entry.path, offset, one.stored_bytes)


def rows_in(data: torch.Tensor, one: WeightSlice) -> Rows:
    """The bytes of a slice as rows of what it is kept as."""
    matrix, count = one.matrix, one.stop - one.start
    if matrix.is_packed:
        makes_kv = matrix.name.endswith(_MAKE_KV)
        return PackedWeight(data, PackedFormat(matrix.kept), count, matrix.columns, makes_kv)
    return data.view(FLOAT_DTYPES[matrix.kept]).view(count, matrix.columns)


def read_slice(reader: CheckpointReader, one: WeightSlice, target: Rows) -> None:
    """Fill rows from disk, converted where they are kept as something else.

    Extra memory: the reader's scratch, or a MiB of rows and what converting them takes.
    Errors: CheckpointError.
    """
    matrix = one.matrix
    if isinstance(target, torch.Tensor):
        reader.read_rows(matrix.name, one.start, one.stop, target)
        return
    if not matrix.is_converted:
        reader.read_bytes(matrix.name, one.start, one.stop, target.data)
        return
    entry = reader.checkpoint.tensors[matrix.name]
    for start, stop in matrix.ranges(_CONVERTED_AT_ONCE):
        first, last = max(start, one.start), min(stop, one.stop)
        if first < last:
            raw = torch.empty(matrix.stored_bytes(last - first), dtype=torch.uint8)
            reader.read_bytes(matrix.name, first, last, raw)
            pack_rows(entry, first, raw, target.rows(first - one.start, last - one.start))


def read_packed_row(reader: CheckpointReader, matrix: Matrix, row: int) -> torch.Tensor:
    """The numbers [columns] that a row of a packed matrix stands for, fp32.

    Extra memory: its panel of 16 rows.
    Errors: CheckpointError.
    """
    start = row // PANEL_ROWS * PANEL_ROWS
    panel = WeightSlice(matrix, start, min(start + PANEL_ROWS, matrix.rows))
    rows = rows_in(torch.empty(panel.kept_bytes, dtype=torch.uint8), panel)
    assert isinstance(rows, PackedWeight), "a packed matrix of numbers"
    read_slice(reader, panel, rows)
    return unpack_rows(rows, torch.tensor([row - start]))[0]


def table_dtype(layout: WeightLayout, dtype: torch.dtype) -> torch.dtype:
    """What rows of an embedding table that is not packed are rounded to.

    Packing writes them in bfloat16; what it is packed from is to give the same bits.
    """
    is_packed = any(matrix.is_packed for matrix in layout.sweep)
    return torch.bfloat16 if is_packed else dtype


def rows_of_tokens(
    token_ids_T: torch.Tensor,
    read_rows: Callable[[Sequence[int], torch.Tensor], None],
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows [T, columns] of an embedding table, each read once by ``read_rows(rows, out)``."""
    token_ids: list[int] = token_ids_T.tolist()
    row_of = {token_id: row for row, token_id in enumerate(dict.fromkeys(token_ids))}
    rows = torch.empty(len(row_of), columns, dtype=dtype)
    read_rows(list(row_of), rows)
    if len(row_of) == len(token_ids):
        return rows
    return rows[[row_of[token_id] for token_id in token_ids]]
