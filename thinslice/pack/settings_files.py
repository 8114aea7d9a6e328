"""The small files of a packed folder: config.json, tokenizer, chat template.

A folder's are copied. A GGUF holds all of it in its header, from which they are made such that they
read back to the same shape, the same token ids and the same template.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tokenizers import processors

from thinslice.checkpoint.file_names import CONFIG, GENERATION_CONFIG, MODEL_CARD
from thinslice.checkpoint.files import file_size, os_errors_named, read_json_object
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import with_vocabulary
from thinslice.errors import CheckpointError
from thinslice.pack.source import own_documents, settings_files
from thinslice.plan.architectures import text_trunk_of
from thinslice.plan.model_shape import ModelShape, RopeScaling
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store.files import publish, sync_file, write_synced
from thinslice.text.tokenizer_files import TokenizerFiles, read_tokenizer_files
from thinslice.units import MIB

_MAX_CONFIG_BYTES = MIB
_MAX_COPIED_BYTES = 64 * MIB
# What llama.cpp calls the tokenizer of a GGUF that has none.
_NO_TOKENIZER = "no_vocab"
# What config.json calls the fields that ModelShape has under the same name.
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "sliding_window",
)


def check_settings(source: Checkpoint) -> None:
    """Refuse a model whose settings a packed folder cannot hold, before anything is written.

    Errors: CheckpointError.
    """
    if source.kind == "gguf":
        config_of(source.shape)
    else:
        _folder_config(source)
    for path in settings_files(source):
        if (num_bytes := file_size(path)) > _MAX_COPIED_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes} bytes; at most {_MAX_COPIED_BYTES} are expected"
            )


def write_settings(source: Checkpoint, packing: Packing, folder: Path) -> None:
    """Write config.json and the tokenizer's files, each whole or not at all; config.json last.

    Peak extra memory: for a GGUF that of its header and of its tokenizer, see
    ``build_gguf_tokenizer``.
    Errors: CheckpointError for a source that cannot be read or expressed; OSError.
    """
    section = {"quantization_config": packing.to_dict()}
    for path in (*settings_files(source), *own_documents(source)):
        if path.name != CONFIG:
            _copy(path, folder / path.name)
    if source.kind == "gguf":
        if not (folder / MODEL_CARD).exists():
            _write_model_card(source, folder / MODEL_CARD)
        if source.sampling:
            _write_json(folder / GENERATION_CONFIG, source.sampling)
        config = config_of(source.shape)
        if source.metadata.get("tokenizer.ggml.model", _NO_TOKENIZER) != _NO_TOKENIZER:
            files = read_tokenizer_files(with_vocabulary(source))
            _write_tokenizer(files, folder)
            # Some are known by keys or texts that only a GGUF's reader looks at.
            more = files.special.eos_token_ids.difference(source.shape.eos_token_ids)
            config["eos_token_id"] += sorted(more)
    else:
        config = _folder_config(source)
    _write_json(folder / CONFIG, config | section)


def _folder_config(source: Checkpoint) -> dict[str, Any]:
    """A folder's own config.json; of a text trunk, one that describes the trunk alone."""
    config = read_json_object(source.path / CONFIG, _MAX_CONFIG_BYTES)
    if text_trunk_of(config) is not None:
        return config_of(source.shape)
    # The file may hold a head of its own although its config ties the embeddings.
    return config | {"tie_word_embeddings": source.shape.tie_word_embeddings}


def config_of(shape: ModelShape) -> dict[str, Any]:
    """A config.json that ``shape_from_config`` reads as this shape.

    Errors: CheckpointError where config.json has no way to say it.
    """
    if shape.sliding_window is not None and shape.architecture == "LlamaForCausalLM":
        # llama.cpp calls Mistral a Llama; in config.json only Mistral's window counts.
        shape = replace(shape, architecture="MistralForCausalLM")
    config = {name: getattr(shape, name) for name in _SAME_NAMES}
    config |= {
        "architectures": [shape.architecture],
        "attention_bias": shape.attention_bias,
        "eos_token_id": list(shape.eos_token_ids),
        "rope_scaling": None if shape.rope_scaling is None else _scaling_of(shape.rope_scaling),
        "torch_dtype": shape.dtype,
    }
    read = shape_from_config(config)
    for field in fields(ModelShape):
        if getattr(read, field.name) != getattr(shape, field.name):
            raise CheckpointError(
                f"this model cannot be packed: config.json of a {shape.architecture} cannot say "
                f"{field.name} {getattr(shape, field.name)!r:.80}"
            )
    return config


def _scaling_of(scaling: RopeScaling) -> dict[str, Any]:
    """Only what is set: config.json's names are those of the fields."""
    default = RopeScaling(scaling.rope_type)
    values = {field.name: getattr(scaling, field.name) for field in fields(RopeScaling)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name in ("rope_type", "factor") or value != getattr(default, name)
    }


def _write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    special = files.special
    if special.prompt_prefix_ids and special.bos_token is None:
        raise CheckpointError(
            f"GGUF: a prompt begins with token {special.prompt_prefix_ids[0]}, which has no text"
        )
    if special.prompt_prefix_ids:
        # As a folder's own tokenizer.json says it; add_bos_token alone is not all that reads it.
        bos = {
            "id": "bos",
            "ids": [*special.prompt_prefix_ids],
            "tokens": [special.bos_token] * len(special.prompt_prefix_ids),
        }
        files.backend.post_processor = processors.TemplateProcessing(
            single="bos $A", special_tokens=[bos]
        )
    part = folder / ".tokenizer.json.part"
    files.backend.save(str(part), pretty=False)
    sync_file(part)
    publish(part, folder / "tokenizer.json")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.bos_token,
        "eos_token": special.eos_token,
        "add_bos_token": bool(special.prompt_prefix_ids),
    }
    if (templates := files.templates.as_config()) is not None:
        config["chat_template"] = templates
    _write_json(folder / "tokenizer_config.json", config)


def _write_model_card(source: Checkpoint, path: Path) -> None:
    """What a GGUF says of its licence, as the Hub's model cards have it."""
    said = {
        name: source.metadata.get(f"general.{key}")
        for name, key in (
            ("license", "license"),
            ("license_name", "license.name"),
            ("license_link", "license.link"),
        )
    }
    # A string of JSON is one of YAML's too, but for pairs of escapes that stand for one character.
    texts = {name: text for name, text in said.items() if isinstance(text, str)}
    if texts:
        lines = (f"{name}: {json.dumps(text, ensure_ascii=False)}" for name, text in texts.items())
        front = "\n".join(["---", *lines, "---"])
        _write(path, f"{front}\n\nPacked by thinslice from {source.files[0].name}.\n".encode())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    write_synced(part, content)
    publish(part, path)


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    with os_errors_named(source):
        content = source.open("rb")
    with content, part.open("wb") as out:
        shutil.copyfileobj(content, out)
    sync_file(part)
    publish(part, target)
