"""The tensors of a text trunk, within a model that also takes in pictures or sound.

Sources: Qwen2.5-VL as transformers writes it, before and since 4.52; MiMo-Audio's own code
(XiaomiMiMo/MiMo-Audio, modeling_mimo_audio.py).
"""

from collections.abc import Mapping
from dataclasses import replace

from thinslice.checkpoint.index import TensorEntry
from thinslice.errors import CheckpointError, plain

_OTHER_PARTS = (
    "visual.",
    "model.visual.",
    "local_transformer.",
    "local_transformer_lm_heads.",
    "input_local_transformer.",
    "speech_embeddings.",
    "speech_embeddings_to_local.",
    "speech_group_downcast.",
    "hidden_states_downcast.",
)
_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


def trunk_name(name: str) -> str | None:
    """A tensor's name in the trunk alone; None for a tensor of another part."""
    if name.startswith(_OTHER_PARTS):
        return None
    for prefix, in_trunk in _PREFIXES.items():
        if name.startswith(prefix):
            return in_trunk + name.removeprefix(prefix)
    return name


def to_trunk_names(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors of the trunk under the names that the family has for them.

    Errors: CheckpointError where two tensors would have the same name.
    """
    renamed: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        own_name = trunk_name(name)
        if own_name is None:
            continue
        if own_name in renamed:
            raise CheckpointError(f"{entry.path}: {plain(own_name, 120)} is there under two names")
        renamed[own_name] = replace(entry, name=own_name)
    return renamed
