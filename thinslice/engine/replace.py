"""Other numbers in the place of a model's weights, while it stays loaded: what a trainer does
between two rounds of completions."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from thinslice.engine.runner import Runner
from thinslice.engine.scheduler import Scheduler
from thinslice.errors import BusyError, ConfigError, shown
from thinslice.memory.resident import ResidentWeights
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.tensors import EMBEDDING, HEAD, Room, tensors_of
from thinslice.units import MIB

# Of a tensor in float32 at a time; a row that is longer is taken whole.
_PIECE_BYTES = MIB


def replace_weights(runner: Runner, scheduler: Scheduler, tensors: Mapping[str, object]) -> None:
    """Replace some of the weights; what is cached of the old ones is not found any more.

    Extra memory: a piece of 1 MiB of a tensor in float32, and as much for its order in memory.
    Errors: ConfigError with nothing replaced; BusyError while requests are under way. Where it is
    interrupted, the model refuses to run until all has been replaced.
    """
    weights, source = runner.weights, runner.weights.source
    if not isinstance(source, ResidentWeights):
        raise ConfigError(
            "only weights that lie in memory as numbers can be replaced; load the model with dtype "
            "bfloat16 or float32, and with memory for all of it"
        )
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"tensors is {shown(tensors)}; expected a mapping from names to tensors")
    for name in tensors:
        if not isinstance(name, str):
            raise ConfigError(f"tensors has the name {shown(name)}; expected text")
    own = loaded_tensors(dict(tensors), weights.shape, source)
    source.check(own)
    for name, one in own.items():
        _numbers(name, one, slice(1))  # refused before anything is replaced
    if scheduler.has_work:
        raise BusyError("weights are replaced between requests, and some are under way")
    scheduler.blocks.weights_version += 1
    weights.is_whole = False
    for name, one in own.items():
        write(source, name, one)
    weights.is_whole = True


def write(source: ResidentWeights, name: str, tensor: object) -> None:
    """Copy a tensor's numbers into the place of one of its shape, piece by piece."""
    for rows in _pieces(source.tensors[name].shape):
        source.write(name, rows, _numbers(name, tensor, rows))


def loaded_tensors(
    tensors: dict[str, object], shape: ModelShape, source: ResidentWeights
) -> dict[str, object]:
    """A state dict without what it has twice, or has for layers that are not loaded.

    Errors: ConfigError for a tied head that is another than the embedding, or does not fit.
    """
    if shape.tie_word_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        embedding = tensors.setdefault(EMBEDDING, head)
        for one in (embedding, head):
            source.check({EMBEDDING: one})
        if embedding is not head and not all(
            np.array_equal(_numbers(EMBEDDING, embedding, rows), _numbers(HEAD, head, rows))
            for rows in _pieces(source.tensors[EMBEDDING].shape)
        ):
            raise ConfigError(f"{HEAD} is {EMBEDDING} in this model, and they are to differ")
    not_loaded = {one.name for one in tensors_of(shape) if one.room is Room.PREDICTION}
    not_loaded -= source.tensors.keys()
    return {name: one for name, one in tensors.items() if name not in not_loaded}


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows that are taken at a time."""
    step = max(_PIECE_BYTES // (4 * math.prod(shape[1:])), 1)
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def _numbers(name: str, tensor: object, rows: slice) -> NDArray[np.floating]:
    """The numbers of rows of an array, or of a tensor of torch's: there float32, and those of
    float32 on the host where they lie.

    Errors: ConfigError for what has none.
    """
    if isinstance(tensor, np.ndarray):
        if tensor.dtype not in (np.float32, np.float16, np.float64):
            raise ConfigError(f"{name} is to become an array of {tensor.dtype}; expected floats")
        piece = tensor[rows]
        return piece if piece.dtype == np.float16 else piece.astype(np.float32, copy=False)
    # Torch is not asked for by name: who has a tensor has it, and others need it not.
    try:
        if not tensor.is_floating_point():  # type: ignore[attr-defined]
            kind = f"a tensor of {tensor.dtype}"  # type: ignore[attr-defined]
            raise ConfigError(f"{name} is to become {kind}; expected dense floats")
        piece = tensor.detach()[rows]  # type: ignore[attr-defined]
        numbers: NDArray[np.float32] = piece.float().cpu().numpy()
    except (AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"{name} is to become {shown(tensor)}; expected an array or a dense tensor of floats"
        ) from error
    return numbers
