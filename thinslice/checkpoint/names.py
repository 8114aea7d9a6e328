"""The tensors a ModelShape implies, by name and shape, and their comparison with a checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import replace

from thinslice.checkpoint.index import TensorEntry
from thinslice.errors import CheckpointError, plain
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.packing import Packing
from thinslice.plan.tensors import HEAD, tensors_of

_NUM_SHOWN = 10
# Rotary frequencies, positions and masks that old checkpoints store although they follow from the
# config.
_BUFFER = re.compile(
    r"model\.(layers\.\d+\.self_attn\.)?"
    r"(rotary_emb\.(original_)?inv_freq|rotary_emb\.(cos|sin)_cached|position_ids)",
    re.ASCII,
)
# What safetensors calls whole numbers and truth values: no weight of ours is one.
_WHOLE_DTYPES = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U16", "U32", "U64"})
_PREDICTION_LAYER = re.compile(r"model\.mtp_layers\.(\d{1,4})\.", re.ASCII)

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(shape: ModelShape, packing: Packing | None = None) -> Shapes:
    """Every tensor of a model under its exact name, with its shape, rows first.

    Args:
        packing: of a packed checkpoint, whose feed-forwards are cut into blocks.
    """
    return {tensor.name: tensor.shape for tensor in tensors_of(shape, packing)}


def check_names(
    shape: ModelShape, tensors: Mapping[str, TensorEntry], packing: Packing | None = None
) -> tuple[ModelShape, dict[str, TensorEntry]]:
    """Compare a checkpoint with its shape; return the shape as it holds, and the tensors in use.

    Some tensors need not be used and are left out: stored rotary frequencies, a head although the
    embeddings are tied, prediction layers the config does not count, and, where no weight is
    missing, tensors of whole numbers. A checkpoint without any prediction layer, such as a re-save
    of MiMo, is whole: the returned shape then counts none.

    Errors: one CheckpointError with all that is missing, unexpected or misshapen.
    """
    if not any(_PREDICTION_LAYER.match(name) for name in tensors):
        shape = replace(shape, num_nextn_predict_layers=0)
    expected = expected_tensors(shape, packing)
    missing = [name for name in expected if name not in tensors]
    unexpected = [
        f"{name!r:.120}"
        for name, entry in tensors.items()
        if name not in expected
        and not _is_ignorable(name, shape)
        and (missing or entry.dtype not in _WHOLE_DTYPES)
    ]
    misshapen = [
        f"{name} {tensors[name].shape}, not {wanted}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()):
        lines = [f"\n  {_listed(kind, items)}" for kind, items in problems.items() if items]
        raise CheckpointError(
            f"the tensors are not those of the {shape.architecture} that the checkpoint "
            f"describes{''.join(lines)}"
        )
    return shape, {name: tensors[name] for name in expected}


def left_out_note(shape: ModelShape, tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """A line naming the tensors that ``check_names`` leaves out without knowing what they are."""
    expected = expected_tensors(shape)
    odd = [
        plain(name, 120)
        for name in tensors
        if name not in expected and not _is_ignorable(name, shape)
    ]
    if not odd:
        return ()
    return (f"tensors of whole numbers are left out: {_listed('unknown', sorted(odd))}",)


def _is_ignorable(name: str, shape: ModelShape) -> bool:
    if name == HEAD:  # not expected, so the embeddings are tied
        return True
    prediction_layer = _PREDICTION_LAYER.match(name)
    if prediction_layer is not None:
        return int(prediction_layer[1]) >= shape.num_nextn_predict_layers
    return _BUFFER.fullmatch(name) is not None


def _listed(kind: str, items: list[str]) -> str:
    shown = ", ".join(items[:_NUM_SHOWN])
    rest = len(items) - _NUM_SHOWN
    return f"{len(items)} {kind}: {shown}" + (f" and {rest} more" if rest > 0 else "")
