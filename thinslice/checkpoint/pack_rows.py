"""Rows as they lie on disk, into a packed matrix."""

import torch
from gguf.constants import GGMLQuantizationType

from thinslice.checkpoint.index import TensorEntry
from thinslice.checkpoint.reader import decode_rows
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.quantize import from_gguf_into, quantize_into
from thinslice.plan.packed_format import packed_format_of

# Block types whose codes stay what they are.
_EXACT = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K"})


def pack_rows(entry: TensorEntry, start: int, raw: torch.Tensor, target: PackedWeight) -> None:
    """Fill a packed matrix with rows from ``start`` on.

    Args:
        raw: the rows' bytes as they are on disk, uint8 [num_bytes]; for an entry with
            ``rotary_heads`` whole heads.

    Errors: CheckpointError for values that cannot be quantised.
    """
    if entry.dtype not in _EXACT or packed_format_of(entry.dtype) is not target.format:
        quantize_into(target, decode_rows(entry, start, raw).float())
        return
    rows = raw.view(-1, entry.row_bytes)
    if entry.rotary_heads:
        # Within a head, row i * H/2 + j (i = 0, 1) is kept at 2 * j + i.
        head_rows = entry.shape[0] // entry.rotary_heads
        pairs = rows.view(-1, head_rows // 2, 2, entry.row_bytes)
        rows = pairs.transpose(1, 2).reshape(rows.shape)
    from_gguf_into(target, rows.numpy(), GGMLQuantizationType[entry.dtype])
