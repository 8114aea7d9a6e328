"""What is in a checkpoint: every tensor's file, dtype, shape and byte range, and the model's shape.

Plain data. Opening a path is in open.py; reading bytes is in reader.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packed_format import PANEL_ROWS, PackedFormat, num_panels
from thinslice.plan.packing import Packing
from thinslice.plan.weight_layout import Stored, StoredMatrix

_PACKED_FORMATS = frozenset(PackedFormat)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place on disk.

    Attributes:
        name: the name Hugging Face checkpoints use, also for a GGUF.
        dtype: BF16, F16, F32, the ggml name of a quantised type such as Q4_1, or the PackedFormat
            of a packed checkpoint's matrix.
        shape: rows first, as torch has it (a GGUF header stores it reversed); of a packed matrix
            its rows and columns, whatever the header says of its bytes.
        offset: first byte in the file, from its start.
        rotary_heads: for q and k rows of a GGUF of the Llama family, whose rows llama.cpp reorders
            within each head (pairs side by side), the number of heads; 0 elsewhere. The reader
            puts the rows back.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    rotary_heads: int = 0

    @property
    def row_grain(self) -> int:
        """Rows that are put back in order together: those of a head, else each alone."""
        return self.shape[0] // self.rotary_heads if self.rotary_heads else 1

    @property
    def is_packed(self) -> bool:
        """Whether the tensor is a packed matrix, whose rows come in panels of 16."""
        return self.dtype in _PACKED_FORMATS

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; of a packed matrix, its share of a panel."""
        if self.is_packed:
            return self.num_bytes // (num_panels(self.shape[0]) * PANEL_ROWS)
        return self.num_bytes // self.shape[0]


@dataclass(frozen=True)
class Checkpoint:
    """An opened model: its shape, its tensors and, for a GGUF, its metadata.

    Attributes:
        path: the folder, or the .gguf file (the first of a split one).
        kind: ``safetensors`` or ``gguf``.
        files: every file that holds tensors.
        metadata: the GGUF key-value pairs; empty for safetensors.
        packing: how a packed checkpoint is cut; None for every other.
        notes: what its user should know, one line each: keys that are not read, tensors left out.
        sampling: the sampling parameters that its files advise, by name.
    """

    path: Path
    kind: str
    shape: ModelShape
    tensors: Mapping[str, TensorEntry]
    files: tuple[Path, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    packing: Packing | None = None
    notes: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @property
    def stored(self) -> Stored:
        """How each matrix lies on disk."""
        return {
            name: StoredMatrix(entry.dtype, entry.row_bytes)
            for name, entry in self.tensors.items()
            if len(entry.shape) == 2
        }
