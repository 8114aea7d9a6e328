"""Added tokens that are named beside tokenizer.json: in tokenizer_config.json and older files.

Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py: added_tokens_decoder goes before special_tokens_map.json and
added_tokens.json; named special tokens come after them, in this order.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from thinslice.checkpoint.files import read_json_object
from thinslice.errors import CheckpointError

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_BYTES = 8 << 20


def settings_with_special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with what special_tokens_map.json says where that is read."""
    path = folder / "special_tokens_map.json"
    if "added_tokens_decoder" in config or not path.exists():
        return dict(config)
    return {**config, **read_json_object(path, _MAX_BYTES)}


def add_named_tokens(
    backend: Tokenizer, folder: Path, config: Mapping[str, Any], vocab_size: int
) -> None:
    """Add the tokens that the settings name, with the ids that they name.

    Errors: CheckpointError for a token that would get another id, or one without an embedding.
    """
    names = [text for text, _ in _special(config)]
    for token_id, token in sorted(_numbered(folder, config, names), key=lambda one: one[0]):
        _add(backend, token)
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: token {token.content!r:.60} is given the id {token_id}, and the "
                f"tokenizer has it as {backend.token_to_id(token.content)}"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text, token in _special(config):
        if text and text not in known:
            found = backend.token_to_id(text)
            if found is None or found >= vocab_size:
                raise CheckpointError(
                    f"{folder}: the special token {text!r:.60} is in no vocabulary, so that it "
                    f"has no embedding among {vocab_size}"
                )
            _add(backend, token)


def _add(backend: Tokenizer, token: AddedToken) -> None:
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def _numbered(
    folder: Path, config: Mapping[str, Any], special: list[str]
) -> Iterator[tuple[int, AddedToken]]:
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for key, value in decoder.items():
            if not (key.isdecimal() and isinstance(value, dict)):
                raise CheckpointError(f"{folder}: added_tokens_decoder has {key!r:.40}; no token")
            yield int(key), _token(value, is_special=False)
        return
    path = folder / "added_tokens.json"
    if path.exists():
        for text, token_id in read_json_object(path, _MAX_BYTES).items():
            if type(token_id) is not int:
                raise CheckpointError(f"{path}: {text!r:.60} has the id {token_id!r:.40}")
            is_special = text in special
            yield token_id, AddedToken(text, normalized=not is_special, special=is_special)


def _special(config: Mapping[str, Any]) -> Iterator[tuple[str, AddedToken]]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = list(extra.values()) if isinstance(extra, dict) else extra
    named = [config.get(f"{name}_token") for name in _NAMES]
    for value in [*named, *(more if isinstance(more, list) else [])]:
        if isinstance(value, str | dict) and value:
            token = _token(value, is_special=True)
            yield token.content, token


def _token(value: str | Mapping[str, Any], is_special: bool) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=is_special)
    content = value.get("content")
    flags = {name: value[name] for name in _FLAGS if name in value}
    if not isinstance(content, str) or not all(type(flag) is bool for flag in flags.values()):
        raise CheckpointError(f"a special token is {value!r:.80}; expected its content and flags")
    return AddedToken(content, **{**flags, "special": is_special or flags.get("special", False)})
