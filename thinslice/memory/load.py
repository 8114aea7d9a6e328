"""Place a checkpoint's weights in a decoder, one tensor at a time."""

from collections.abc import Callable

import torch
from torch import nn

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.model.decoder import Decoder

Progress = Callable[[int, int], None]


def load_resident(
    decoder: Decoder,
    reader: CheckpointReader,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Fill every parameter of the decoder from the checkpoint, converted to ``dtype``.

    ``progress`` is called with bytes placed so far and in all.
    Extra memory: the reader's scratch; each tensor is read straight into its place.
    Errors: CheckpointError from the reader.
    """
    parameters = dict(decoder.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
    placed = 0
    for name, parameter in parameters.items():
        _place(decoder, reader, name, torch.empty(parameter.shape, dtype=dtype))
        placed += parameter.numel() * dtype.itemsize
        if progress is not None:
            progress(placed, total)
    decoder.tie_head()


def load_vectors(decoder: Decoder, reader: CheckpointReader, dtype: torch.dtype) -> None:
    """Fill the norms and biases only: all that is always resident.

    Errors: CheckpointError from the reader.
    """
    vectors = [(name, p) for name, p in decoder.named_parameters() if p.ndim == 1]
    for name, parameter in vectors:
        _place(decoder, reader, name, torch.empty(parameter.shape, dtype=dtype))


def _place(module: nn.Module, reader: CheckpointReader, name: str, weight: torch.Tensor) -> None:
    reader.read(name, weight)
    path, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(path), attribute, nn.Parameter(weight, requires_grad=False))
