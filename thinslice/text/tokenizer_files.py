"""Read what a model's files say about its tokenizer; nothing in them is trusted."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from thinslice.checkpoint.files import is_there, read_capped, read_json_object
from thinslice.checkpoint.index import Checkpoint
from thinslice.errors import CheckpointError
from thinslice.plan.known_keys import named_keys
from thinslice.process import without_collections
from thinslice.text.end_tokens import end_texts, fill_end_ids
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer, prepends_bos
from thinslice.text.known_keys import (
    check_tokenizer_settings,
    gguf_tokenizer_notes,
    tokenizer_config_notes,
    tokenizer_json_notes,
)
from thinslice.text.library_errors import named_library_errors
from thinslice.text.named_tokens import (
    add_named_tokens,
    further_texts,
    read_special_tokens_map,
    settings_with_special_tokens,
)
from thinslice.text.post_processor import tokens_around
from thinslice.text.template_source import TemplateSources, folder_templates, gguf_templates
from thinslice.units import MIB

# Qwen3's tokenizer.json has 11 MiB, Gemma's 33 MiB.
_MAX_TOKENIZER_BYTES = 64 * MIB
_MAX_CONFIG_BYTES = 8 * MIB
# WordPiece's ## before the later pieces of a word; no model here has it, and merges that do not
# fit it panic in tokenizers.
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')


@dataclass(frozen=True)
class SpecialTokens:
    """What a model's files say about its special tokens.

    Attributes:
        prompt_prefix_ids: what a plain prompt begins with, such as BOS; mostly nothing.
        eos_token_ids: every id that ends a generation: the configuration's, the tokenizer's, and
            what the vocabulary has of the supported families' end tokens.
        bos_token, eos_token: as text, for the chat template; None where the files name none.
        further: texts of the other tokens that the files name, by name, for the chat template. Of
            a GGUF none, as llama.cpp has it.
    """

    prompt_prefix_ids: tuple[int, ...]
    eos_token_ids: frozenset[int]
    bos_token: str | None
    eos_token: str | None
    further: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, str]:
        """The texts of all tokens that have a name."""
        ends = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {**self.further, **{name: text for name, text in ends.items() if text is not None}}


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer itself, which adds no special tokens of its own, and what belongs to it.

    Attributes:
        notes: what a user should know of the files, one line each.
    """

    backend: Tokenizer
    special: SpecialTokens
    templates: TemplateSources
    notes: tuple[str, ...] = ()


def read_tokenizer_files(checkpoint: Checkpoint) -> TokenizerFiles:
    """A GGUF's metadata, or a folder's tokenizer.json, tokenizer_config.json and template.

    Errors: CheckpointError if something is missing, damaged or of a kind that is not supported.
    """
    with without_collections():
        return _read_gguf(checkpoint) if checkpoint.kind == "gguf" else _read_folder(checkpoint)


def _read_gguf(checkpoint: Checkpoint) -> TokenizerFiles:
    metadata = checkpoint.metadata
    with named_library_errors(CheckpointError, "GGUF: no tokenizer can be made of its metadata"):
        backend = build_gguf_tokenizer(metadata)
    bos_token, eos_token = (_gguf_token(metadata, backend, name) for name in ("bos", "eos"))
    prefix_ids: tuple[int, ...] = ()
    if prepends_bos(metadata):
        if bos_token is None:
            raise CheckpointError("GGUF: a prompt begins with BOS, but bos_token_id names no token")
        prefix_ids = (metadata["tokenizer.ggml.bos_token_id"],)
    return TokenizerFiles(
        backend,
        SpecialTokens(
            prompt_prefix_ids=prefix_ids,
            eos_token_ids=_end_ids(backend, checkpoint, eos_token) | fill_end_ids(metadata),
            bos_token=bos_token,
            eos_token=eos_token,
        ),
        templates=gguf_templates(metadata),
        notes=gguf_tokenizer_notes(metadata),
    )


def _gguf_token(metadata: Mapping[str, Any], backend: Tokenizer, name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = metadata.get(key)
    if token_id is None:
        return None
    num_tokens = len(metadata["tokenizer.ggml.tokens"])
    if name == "bos" and type(token_id) is int and not 0 <= token_id < num_tokens:
        # Mostly nothing uses it; where a prompt begins with it, that is refused below.
        return None
    if type(token_id) is not int or not 0 <= token_id < num_tokens:
        raise CheckpointError(f"GGUF: {key} is {token_id!r:.40}, none of {num_tokens} tokens")
    return backend.id_to_token(token_id)


def _read_folder(checkpoint: Checkpoint) -> TokenizerFiles:
    folder = checkpoint.path
    backend, notes = _read_backend(folder / "tokenizer.json")
    path = folder / "tokenizer_config.json"
    config = read_json_object(path, _MAX_CONFIG_BYTES) if is_there(path) else {}
    special_map = read_special_tokens_map(folder, config)
    settings = settings_with_special_tokens(config, special_map)
    check_tokenizer_settings(settings)
    notes += tokenizer_config_notes(config, special_map, backend)
    bos_token, eos_token = (_token_text(settings, name) for name in ("bos_token", "eos_token"))
    if not is_there(path):
        shape = checkpoint.shape
        bos_token = bos_token or _first_token(backend, (shape.bos_token_id,), shape.vocab_size)
        eos_token = eos_token or _first_token(backend, shape.eos_token_ids, shape.vocab_size)
    with named_library_errors(CheckpointError, f"{folder}: its added tokens are no good"):
        add_named_tokens(backend, folder, settings, checkpoint.shape.vocab_size)
    around = tokens_around(backend, checkpoint.shape.vocab_size)
    if around.after:
        notes += (_after_note(around.after),)
    # One whose template leaves out the text drops it, and one with missing parts panics.
    backend.post_processor = None
    prefix_ids, asked = around.before, settings.get("add_bos_token")
    if asked is not None:
        # As in llama.cpp and transformers 4; transformers 5 takes the post-processor's word.
        bos_id = None if bos_token is None else backend.token_to_id(bos_token)
        prefix_ids = (bos_id,) if asked and bos_id is not None else ()
        if prefix_ids != around.before:
            notes += (_bos_note(asked, around.before),)
    return TokenizerFiles(
        backend,
        SpecialTokens(
            prompt_prefix_ids=prefix_ids,
            eos_token_ids=_end_ids(backend, checkpoint, eos_token),
            bos_token=bos_token,
            eos_token=eos_token,
            further=further_texts(settings),
        ),
        templates=folder_templates(folder, settings),
        notes=notes,
    )


def _after_note(names: tuple[str, ...]) -> str:
    verb = "is" if len(names) == 1 else "are"
    return f"tokenizer.json ends a text with {named_keys(list(names))}, which {verb} not applied"


def _bos_note(add_bos_token: bool, prefix_ids: tuple[int, ...]) -> str:
    begins = f"with token {prefix_ids[0]}" if prefix_ids else "with no token of its own"
    return (
        f"tokenizer_config.json sets add_bos_token to {str(add_bos_token).lower()}, and "
        f"tokenizer.json begins a prompt {begins}; tokenizer_config.json is followed"
    )


def _read_backend(path: Path) -> tuple[Tokenizer, tuple[str, ...]]:
    if not is_there(path):
        raise CheckpointError(
            f"{path.parent} has no tokenizer.json; other tokenizer files are not read. "
            "transformers' AutoTokenizer can write one with save_pretrained"
        )
    content = read_capped(path, _MAX_TOKENIZER_BYTES)
    if _SUBWORD_PREFIX.search(content):
        raise CheckpointError(f"{path}: a tokenizer with a subword prefix is not supported")
    with named_library_errors(CheckpointError, f"{path} is no valid tokenizer"):
        backend = Tokenizer.from_buffer(content)
    if not isinstance(backend.model, models.BPE):
        kind = type(backend.model).__name__
        raise CheckpointError(f"{path}: a {kind} tokenizer is not supported; only BPE is")
    # Some files carry what their training used: prompts would be cut, filled or split at random.
    backend.no_truncation()
    backend.no_padding()
    backend.model.dropout = None
    return backend, tokenizer_json_notes(content)


def _end_ids(backend: Tokenizer, checkpoint: Checkpoint, eos_token: str | None) -> frozenset[int]:
    ids = {*checkpoint.shape.eos_token_ids}
    eos_id = None if eos_token is None else backend.token_to_id(eos_token)
    if eos_id is not None:
        ids.add(eos_id)
    added = backend.get_added_tokens_decoder().items()
    special = {token.content: token_id for token_id, token in added if token.special}
    return frozenset(ids | {special[text] for text in end_texts(special)})


def _token_text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise CheckpointError(f"tokenizer_config.json: {name} is {value!r:.80}; expected a string")
    return text


def _first_token(backend: Tokenizer, ids: tuple[int | None, ...], vocab_size: int) -> str | None:
    """The text of the first of the ids; None for one that no token of the model can have."""
    token_id = next(iter(ids), None)
    if token_id is None or not 0 <= token_id < vocab_size:
        return None
    return backend.id_to_token(token_id)
