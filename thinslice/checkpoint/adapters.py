"""Adapters: low-rank parts for another model, which are no model and are not applied to one."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from thinslice.checkpoint.files import read_json_object
from thinslice.errors import CheckpointError, plain
from thinslice.units import MIB

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".npz")
_LORA_PARTS = (".lora_a", ".lora_b")
# What general.type says of a GGUF that is no model.
_OTHER_KINDS = {
    "mmproj": "the part of a model that takes in pictures or sound",
    "imatrix": "statistics for a quantiser",
}


def is_adapter_weights(name: str) -> bool:
    """Whether a file's name is that of an adapter's weights, as PEFT and MLX write them."""
    return name.startswith("adapter") and name.endswith(_WEIGHTS_SUFFIXES)


def refuse_adapters(folder: Path, names: Iterable[str]) -> None:
    """Refuse a folder whose files hold an adapter, alone or beside a model.

    Beside a model it would change every answer, if the folder is read as transformers reads it.

    Errors: CheckpointError that says which base it is of, and what would work.
    """
    names = list(names)
    weights = [name for name in names if is_adapter_weights(name)]
    others = (".safetensors", ".gguf")
    has_model = any(name.endswith(others) and name not in weights for name in names)
    if not weights or (has_model and ADAPTER_CONFIG not in names):
        return
    base = _base_of(folder / ADAPTER_CONFIG)
    if has_model:
        raise CheckpointError(
            f"{folder} holds an adapter beside the model ({ADAPTER_CONFIG}, of {base}), which is "
            "not applied: merge it into the model, or move it out of the folder to run the model "
            "without it"
        )
    raise CheckpointError(
        f"{folder} holds an adapter of {base}, not a whole model: merge it into that model first "
        "(PEFT: merge_and_unload), then name the merged folder"
    )


def refuse_other_gguf(path: Path, metadata: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Refuse a GGUF that says of itself that it is something else than a model.

    Errors: CheckpointError that says what it is.
    """
    kind = metadata.get("general.type", "model")
    if kind == "adapter" or any(name.endswith(_LORA_PARTS) for name in tensors):
        architecture = metadata.get("general.architecture")
        base = metadata.get("general.base_model.0.repo_url") or metadata.get(
            "general.base_model.0.name"
        )
        of = f"for a {plain(architecture, 40)} model"
        if isinstance(base, str):
            of = f"of {plain(base, 120)}"
        raise CheckpointError(
            f"{path} is an adapter {of}, not a whole model: merge it into its base model first "
            "(llama.cpp: llama-export-lora), then name the merged file"
        )
    if isinstance(kind, str) and kind in _OTHER_KINDS:
        raise CheckpointError(
            f"{path} is {_OTHER_KINDS[kind]} (general.type {kind}), not a whole model; name the "
            "model's own file"
        )


def _base_of(path: Path) -> str:
    """The model that an adapter was made for, as far as its settings can be read."""
    try:
        base = read_json_object(path, MIB).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    return plain(base, 120) if isinstance(base, str) and base else "a model it does not name"
