"""From rows as they lie on disk to a packed matrix."""

import torch
from gguf.constants import GGMLQuantizationType

from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.reader import decode_rows, restore_rows
from thinslice.kernels import native
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.quantize import from_gguf_into, quantize_into
from thinslice.plan.packed_format import keeps_codes


def pack_rows(entry: TensorEntry, start: int, raw: torch.Tensor, target: PackedWeight) -> None:
    """Fill a packed matrix with rows from ``start`` on.

    Args:
        entry: a matrix that is not packed yet.
        start: the first row; for an entry with ``rotary_heads`` rows are given as whole heads.
        raw: the rows' bytes as they are on disk, uint8 [num_bytes].
        target: as many rows.

    Peak extra memory: about 8 MiB where the codes are kept, and another copy of ``raw`` where
    llama.cpp reordered its rows; elsewhere up to 24 bytes for each weight.
    Errors: CheckpointError for weights that cannot be quantised.
    """
    if not keeps_codes(entry.dtype, target.format):
        quantize_into(target, decode_rows(entry, start, raw))
        return
    rows = restore_rows(entry, start, raw.view(-1, entry.row_bytes))
    if entry.dtype in native.REPACKED_TYPES and native.is_available():
        native.repack(rows, entry.dtype, target)
        return
    from_gguf_into(target, rows.numpy(), GGMLQuantizationType[entry.dtype])
