"""The weights of a model as numbers that all lie in memory."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ConfigError, plain, shown
from thinslice.kernels.arrays import Numbers, empty
from thinslice.kernels.native_pack import converted, copy_into
from thinslice.kernels.ops import Linear
from thinslice.model.weights import ReadStats
from thinslice.plan.tensors import EMBEDDING, Room, Tensor, tensors_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedDtypes:
    """What numbers become.

    Attributes:
        matrices: where they are not packed.
        vectors: norms and biases, and rows of the embedding.
    """

    matrices: np.dtype
    vectors: np.dtype


class ResidentWeights:
    """Tensors by their names; a ``WeightSource``."""

    layer_rows = None
    streams = False

    def __init__(self, tensors: Mapping[str, Numbers]) -> None:
        self.tensors = dict(tensors)

    def vector(self, name: str) -> Numbers:
        """A norm or a bias."""
        return self.tensors[name]

    def linear(self, name: str, bias: Numbers | None) -> Linear:
        """A matrix and its bias."""
        return Linear.resident(self.tensors[name], bias)

    def embed(self, token_ids_T: NDArray[np.int64]) -> Numbers:
        """Rows of the embedding table, [T, D]."""
        return converted(self.tensors[EMBEDDING][token_ids_T], np.dtype(np.float32))

    def check(self, tensors: Mapping[str, object]) -> None:
        """Errors: ConfigError where not all of these could take the places of tensors here."""
        for name, tensor in tensors.items():
            if name not in self.tensors:
                raise ConfigError(f"{plain(name, 100)} is no weight that this model has loaded")
            shape = getattr(tensor, "shape", None)
            if shape is None:
                raise ConfigError(f"{name} is to become {shown(tensor)}; expected a tensor")
            own = self.tensors[name].shape
            if tuple(shape) != own:
                raise ConfigError(f"{name} is {list(own)}, and {list(shape)} is to replace it")

    def write(self, name: str, rows: slice, numbers: Numbers) -> None:
        """Copy numbers into the place of rows of a tensor here, rounded to its type."""
        copy_into(numbers, self.tensors[name][rows])

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
    total, placed = sum(tensor.numel for tensor in wanted), 0
    tensors: dict[str, Numbers] = {}
    for tensor in wanted:
        tensors[tensor.name] = _read(reader, tensor, dtypes)
        placed += tensor.numel
        if progress is not None:
            progress(placed * dtypes.matrices.itemsize, total * dtypes.matrices.itemsize)
    return ResidentWeights(tensors)


def load_vectors(
    reader: CheckpointReader, dtypes: LoadedDtypes, has_predictions: bool
) -> dict[str, Numbers]:
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


def _read(reader: CheckpointReader, tensor: Tensor, dtypes: LoadedDtypes) -> Numbers:
    data = empty(tensor.shape, dtypes.matrices if tensor.is_matrix else dtypes.vectors)
    reader.read(tensor.name, data)
    return data
