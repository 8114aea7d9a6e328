"""Place a checkpoint's weights in a decoder, one tensor at a time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.model.decoder import Decoder, RMSNorm

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedDtypes:
    """What parameters become: norms apart, for the compiled kernels take them in float32."""

    weights: torch.dtype
    norms: torch.dtype


def load_resident(
    decoder: Decoder,
    reader: CheckpointReader,
    dtypes: LoadedDtypes,
    progress: Progress | None = None,
) -> None:
    """Fill every parameter of the decoder from the checkpoint.

    ``progress`` is called with bytes placed so far and in all.
    Extra memory: the reader's scratch; each tensor is read straight into its place.
    Errors: CheckpointError from the reader.
    """
    parameters = dict(decoder.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    placed = 0
    for name, parameter in parameters.items():
        _place(decoder, reader, name, dtypes)
        placed += parameter.numel()
        if progress is not None:
            progress(placed * dtypes.weights.itemsize, total * dtypes.weights.itemsize)
    decoder.tie_head()


def load_vectors(decoder: Decoder, reader: CheckpointReader, dtypes: LoadedDtypes) -> None:
    """Fill the norms and biases only: all that is always resident.

    Errors: CheckpointError from the reader.
    """
    for name in [name for name, p in decoder.named_parameters() if p.ndim == 1]:
        _place(decoder, reader, name, dtypes)


def _place(module: Decoder, reader: CheckpointReader, name: str, dtypes: LoadedDtypes) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    dtype = dtypes.norms if isinstance(owner, RMSNorm) else dtypes.weights
    weight = torch.empty(getattr(owner, attribute).shape, dtype=dtype)
    reader.read(name, weight)
    setattr(owner, attribute, nn.Parameter(weight, requires_grad=False))
