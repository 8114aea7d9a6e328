"""What becomes of a checkpoint's float16 numbers, which no plan computes with as they are."""

from thinslice.checkpoint.index import Checkpoint
from thinslice.engine.planning import Model
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.tensors import EMBEDDING, HEAD

_ROUNDED = "rounded to bfloat16, which keeps 8 of their 11 significant bits"
_EXACT = "computed with as float32, which holds each of their numbers exactly"


def float16_notes(checkpoint: Checkpoint, wanted: str) -> tuple[str, ...]:
    """One line where matrices of a checkpoint are float16; none for any other.

    Norms and biases are not told of: the processor has them in float32, exactly.

    Args:
        wanted: the weight type that is asked for; auto takes the checkpoint's own.

    Errors: ConfigError as ``Model.dtype``.
    """
    stored = checkpoint.stored
    names = {name for name, matrix in stored.items() if matrix.dtype == "F16"}
    if not names:
        return ()
    count = f"{len(names)} of " if len(names) < len(stored) else ""
    fates = " and ".join(_fates(Model.of(checkpoint), wanted, names))
    return (f"{count}the model's {len(stored)} matrices are float16: {fates}",)


def _fates(model: Model, wanted: str, names: set[str]) -> list[str]:
    dtype = model.dtype(wanted)
    if dtype == "float32":
        return [_EXACT]
    if dtype == "bfloat16":
        return [f"{_ROUNDED}; --dtype float32 keeps them all"]
    layout = model.layout(dtype)
    matrices = (*layout.sweep, *layout.prediction)
    kept = {one.kept for one in matrices if one.tensor.origin.name in names}
    formats = " and ".join(sorted(kept & set(PackedFormat)))
    fates = [f"quantised to {formats}"] if formats else []
    if "float32" in kept:  # rows that do not divide into groups
        fates.append(_EXACT)
    if EMBEDDING in names and HEAD in model.stored:
        fates.append(f"in the embedding table {_ROUNDED}")
    return fates
