"""Place a checkpoint's weights in a decoder, one tensor at a time."""

from collections.abc import Callable

import torch
from torch import nn

from thinslice.checkpoint.reader import CheckpointReader

Progress = Callable[[int, int], None]


def load_resident(
    module: nn.Module,
    reader: CheckpointReader,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> None:
    """Fill every parameter of ``module`` from the checkpoint, converted to ``dtype``.

    ``progress`` is called with bytes placed so far and in all.
    Extra memory: the reader's scratch; each tensor is read straight into its place.
    Errors: CheckpointError from the reader.
    """
    parameters = dict(module.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values()) * dtype.itemsize
    placed = 0
    for name, parameter in parameters.items():
        weight = torch.empty(parameter.shape, dtype=dtype)
        reader.read(name, weight)
        _replace(module, name, weight)
        placed += weight.nbytes
        if progress is not None:
            progress(placed, total)


def _replace(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, attribute, nn.Parameter(weight, requires_grad=False))
