"""The weights of a model as numbers that all lie in memory."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ConfigError, shown
from thinslice.kernels.ops import Linear
from thinslice.model.weights import ReadStats
from thinslice.plan.tensors import EMBEDDING, Role, Room, Tensor, tensors_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedDtypes:
    """What tensors become: norms apart, for the compiled kernels take them in float32."""

    weights: torch.dtype
    norms: torch.dtype


class ResidentWeights:
    """Tensors by their names; a ``WeightSource``."""

    layer_rows = None
    streams = False

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def vector(self, name: str) -> torch.Tensor:
        """A norm or a bias."""
        return self.tensors[name]

    def linear(self, name: str, bias: torch.Tensor | None) -> Linear:
        """A matrix and its bias."""
        return Linear.resident(self.tensors[name], bias)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table, [T, D]."""
        return F.embedding(token_ids_T, self.tensors[EMBEDDING])

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Errors: ConfigError where not all of these could take the places of tensors here."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise ConfigError(f"{name} is no weight that this model has loaded")
            if not isinstance(tensor, torch.Tensor):
                raise ConfigError(f"{name} is to become {shown(tensor)}; expected a tensor")
            if not tensor.is_floating_point() or tensor.layout is not torch.strided:
                kind = f"a tensor of {tensor.dtype}, {tensor.layout}"
                raise ConfigError(f"{name} is to become {kind}; expected dense floats")
            if tensor.is_meta:
                raise ConfigError(f"{name} is to become a tensor without numbers, on meta")
            if tensor.shape != self.tensors[name].shape:
                own = list(self.tensors[name].shape)
                raise ConfigError(f"{name} is {own}, and {list(tensor.shape)} is to replace it")

    @torch.no_grad()
    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy these into the places of tensors here, rounded to their types."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def hold(self) -> AbstractContextManager[None]:
        """Nothing passes by."""
        return nullcontext()

    def begin_sweep(self) -> None:
        """Nothing is read."""

    def read_stats(self) -> ReadStats:
        """Nothing was read."""
        return ReadStats()

    def close(self) -> None:
        """Nothing is open; the tensors go with whoever holds them."""


def load_resident(
    reader: CheckpointReader,
    dtypes: LoadedDtypes,
    has_predictions: bool,
    progress: Progress | None = None,
) -> ResidentWeights:
    """Read every tensor of a checkpoint; those of its prediction layers where they draft.

    ``progress`` is called with bytes placed so far and in all.
    Extra memory: the reader's scratch; each tensor is read straight into its place.
    Errors: CheckpointError from the reader.
    """
    wanted = _tensors(reader, has_predictions)
    total, placed, tensors = sum(tensor.numel for tensor in wanted), 0, {}
    for tensor in wanted:
        tensors[tensor.name] = _read(reader, tensor, dtypes)
        placed += tensor.numel
        if progress is not None:
            progress(placed * dtypes.weights.itemsize, total * dtypes.weights.itemsize)
    return ResidentWeights(tensors)


def load_vectors(
    reader: CheckpointReader, dtypes: LoadedDtypes, has_predictions: bool
) -> dict[str, torch.Tensor]:
    """The norms and biases by their names: all that is always resident.

    Errors: CheckpointError from the reader.
    """
    return {
        tensor.name: _read(reader, tensor, dtypes)
        for tensor in _tensors(reader, has_predictions)
        if not tensor.is_matrix
    }


def _tensors(reader: CheckpointReader, has_predictions: bool) -> list[Tensor]:
    checkpoint = reader.checkpoint
    every = tensors_of(checkpoint.shape, checkpoint.packing)
    return [one for one in every if has_predictions or one.room is not Room.PREDICTION]


def _read(reader: CheckpointReader, tensor: Tensor, dtypes: LoadedDtypes) -> torch.Tensor:
    dtype = dtypes.norms if tensor.role is Role.NORM else dtypes.weights
    data = torch.empty(tensor.shape, dtype=dtype)
    reader.read(tensor.name, data)
    return data
