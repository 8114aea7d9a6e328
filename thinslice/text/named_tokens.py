"""Added tokens that are named beside tokenizer.json: in tokenizer_config.json and older files.

Source: transformers 5.23, tokenization_utils_base.py (_from_pretrained) and
tokenization_utils_tokenizers.py (TokenizersBackend.__init__). added_tokens_decoder says everything
of a token and replaces special_tokens_map.json and added_tokens.json; tokenizer.json goes before
added_tokens.json. A token that is named, by bos_token say, is special whatever else is said of it,
except where there is an added_tokens_decoder without it and tokenizer.json has it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from thinslice.checkpoint.files import is_there, read_json_object
from thinslice.errors import CheckpointError

NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_ADDED_TOKENS = "added_tokens.json"
# Settings that end as names of tokens do.
_SETTINGS = ("add_bos_token", "add_eos_token")
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"
_MODEL = "model_specific_special_tokens"
_DECODER = "added_tokens_decoder"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAX_BYTES = 8 << 20
# Gemma 3 has 6,415. The library compares each added token with all that are there.
_MAX_TOKENS = 16_384
_T = TypeVar("_T")


def read_special_tokens_map(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json where it is read; nothing beside added_tokens_decoder."""
    path = folder / SPECIAL_TOKENS_MAP
    if _DECODER in config or not is_there(path):
        return {}
    return read_json_object(path, _MAX_BYTES)


def settings_with_special_tokens(
    config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]
) -> dict[str, Any]:
    """tokenizer_config.json with what special_tokens_map.json says, each token under one key.

    The map's bos_token and the like go before the config's; its further tokens only stand where the
    config has none.

    Errors: CheckpointError where further tokens are neither a list nor an object, and for a token
    that is no text.
    """
    for source, values in ((_CONFIG, config), (SPECIAL_TOKENS_MAP, special_tokens_map)):
        for key in filter(_names_tokens, values):
            _refuse_half_pairs(source, key, values[key])
        for key in (_EXTRA, _EXTRA_BEFORE):
            if not isinstance(values.get(key) or [], list | dict):
                raise CheckpointError(
                    f"{source}: {key} is {values[key]!r:.60}; expected a list or an object"
                )
    settings = dict(config)
    before = settings.pop(_EXTRA_BEFORE, None)
    settings[_EXTRA] = settings.get(_EXTRA) or before or []
    if isinstance(settings[_EXTRA], dict):
        settings[_MODEL] = {**_model_tokens(settings), **settings[_EXTRA]}
        settings[_EXTRA] = []
    for key, value in special_tokens_map.items():
        if key == _EXTRA and isinstance(value, dict):
            settings[_MODEL] = {**_model_tokens(settings), **value}
        elif key == _EXTRA and isinstance(value, list):
            own = set(map(_key_of, settings[_EXTRA]))
            further = (one for one in value if _key_of(one) not in own)
            settings[_EXTRA] = [*settings[_EXTRA], *further]
        elif key == _EXTRA_BEFORE:
            settings[_EXTRA] = settings[_EXTRA] or value or []
        elif key in NAMES or (_names_tokens(key) and not isinstance(settings.get(key), str)):
            settings[key] = value
    return settings


def _names_tokens(key: str) -> bool:
    is_name = key.endswith("_token") and key not in _SETTINGS
    return is_name or key in (_EXTRA, _EXTRA_BEFORE, _MODEL, _DECODER)


def _refuse_half_pairs(source: str, key: str, value: object) -> None:
    """Refuse halves of surrogate pairs, which JSON can hold and no text can."""
    half = _SURROGATE.search(json.dumps([key, value], ensure_ascii=False))
    if half is not None:
        raise CheckpointError(
            f"{source}: {key!r:.60} holds half of a surrogate pair, {half[0]!r}; it is not valid "
            "Unicode"
        )


def _key_of(value: object) -> object:
    """What is the same for equal tokens; None for what is no token, which is refused later."""
    if isinstance(value, dict) and all(isinstance(one, str | bool) for one in value.values()):
        return tuple(sorted(value.items()))
    return value if isinstance(value, str) else None


def add_named_tokens(
    backend: Tokenizer, folder: Path, settings: Mapping[str, Any], vocab_size: int
) -> None:
    """Add the tokens that the settings name, with the ids that they name, or else the next ones.

    Args:
        settings: as ``settings_with_special_tokens`` gives them.

    The tokenizer is told once for each kind of naming, whatever the number of tokens: each telling
    takes time for all that it has by then.

    Errors: CheckpointError for a token that would get another id, one without an embedding, and
    for more tokens of a kind than ``_MAX_TOKENS``.
    """
    settled = _add_numbered(backend, folder, settings)
    held = _added(backend)
    named = list(_named(settings, folder))
    new = [token for token in named if token.content not in held]
    _make_special(backend, held, named, settled)
    _check_embeddings(backend, folder, new, vocab_size)
    # Such as those of pictures and sound, which a text model may lack.
    of_model = _with_embeddings(backend, _capped(_of_model(settings, folder), folder), vocab_size)
    _make_special(backend, _added(backend), of_model, settled)
    held = _added(backend)
    extra = [one for one in _capped(_extra(settings, folder), folder) if one.content not in held]
    backend.add_tokens(extra)
    _check_embeddings(backend, folder, extra, vocab_size)


def _make_special(
    backend: Tokenizer,
    held: Mapping[str, AddedToken],
    tokens: Iterable[AddedToken],
    settled: frozenset[str],
) -> None:
    """Add tokens that are named; one that is held already, or named before, keeps its flags."""
    special: dict[str, AddedToken] = {}
    for token in tokens:
        if token.content not in settled:
            special.setdefault(token.content, held.get(token.content, token))
    backend.add_special_tokens(list(special.values()))


def _added(backend: Tokenizer) -> dict[str, AddedToken]:
    return {token.content: token for token in backend.get_added_tokens_decoder().values()}


def _capped(tokens: Iterable[_T], folder: Path) -> list[_T]:
    """All of them; refused where they are more than any model names."""
    found = list(islice(tokens, _MAX_TOKENS + 1))
    if len(found) > _MAX_TOKENS:
        raise CheckpointError(f"{folder}: more than {_MAX_TOKENS} added tokens are named")
    return found


def _with_embeddings(
    backend: Tokenizer, tokens: Iterable[AddedToken], vocab_size: int
) -> list[AddedToken]:
    """Keep the tokens that have an id with an embedding, or would get one when added."""
    size = backend.get_vocab_size(with_added_tokens=False)
    next_id = max(size, max(backend.get_added_tokens_decoder(), default=-1) + 1)
    found: list[AddedToken] = []
    new: set[str] = set()
    for token in tokens:
        token_id = backend.token_to_id(token.content)
        if token_id is None and token.content not in new and next_id < vocab_size:
            new.add(token.content)
            next_id += 1
        if token.content in new or (token_id is not None and token_id < vocab_size):
            found.append(token)
    return found


def _check_embeddings(
    backend: Tokenizer, folder: Path, tokens: Iterable[AddedToken], vocab_size: int
) -> None:
    for token in tokens:
        found = backend.token_to_id(token.content)
        if found is None or found >= vocab_size:
            raise CheckpointError(
                f"{folder}: the special token {token.content!r:.60} is in no vocabulary, so that "
                f"it has no embedding among {vocab_size}"
            )


def _add_numbered(backend: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> frozenset[str]:
    """Returns the tokens of which tokenizer.json has the last word."""
    held = set(_added(backend))
    is_decoder = isinstance(settings.get(_DECODER), dict)
    named = (_of_decoder if is_decoder else _of_added_tokens)(folder, settings)
    numbered = sorted(_capped(named, folder), key=lambda one: one[0])
    backend.add_tokens([token for _, token in numbered if is_decoder or token.content not in held])
    for token_id, token in numbered:
        if backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: token {token.content!r:.60} is given the id {token_id}, and the "
                f"tokenizer has it as {backend.token_to_id(token.content)}"
            )
    if not is_decoder:
        return frozenset()
    return frozenset(held.difference(token.content for _, token in numbered))


def _of_decoder(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    for key, value in settings[_DECODER].items():
        if not (key.isdecimal() and isinstance(value, dict)):
            raise CheckpointError(f"{folder}: {_DECODER} has {key!r:.40}; no token")
        yield int(key), _token(value, folder, is_special=value.get("special", False))


def _of_added_tokens(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken]]:
    path = folder / _ADDED_TOKENS
    if not is_there(path):
        return
    special = {token.content for token in (*_named(settings, folder), *_extra(settings, folder))}
    for text, token_id in read_json_object(path, _MAX_BYTES).items():
        if type(token_id) is not int:
            raise CheckpointError(f"{path}: {text!r:.60} has the id {token_id!r:.40}")
        _refuse_half_pairs(str(path), text, token_id)
        is_special = text in special
        yield token_id, AddedToken(text, normalized=not is_special, special=is_special)


def _named(settings: Mapping[str, Any], folder: Path) -> Iterator[AddedToken]:
    for name in NAMES:
        if settings.get(name):
            yield _token(settings[name], folder, is_special=True)


def _extra(settings: Mapping[str, Any], folder: Path) -> Iterator[AddedToken]:
    extra = settings.get(_EXTRA) or []
    if not isinstance(extra, list):
        raise CheckpointError(f"{folder}: {_EXTRA} is {extra!r:.60}; expected tokens")
    for value in extra:
        is_special = not isinstance(value, dict) or value.get("special", True)
        yield _token(value, folder, is_special)


def _of_model(settings: Mapping[str, Any], folder: Path) -> Iterator[AddedToken]:
    """Tokens under a name of the model's own, such as image_token."""
    own = {key: value for key, value in settings.items() if is_model_token(key, value)}
    for value in {**own, **_model_tokens(settings)}.values():
        if value:
            yield _token(value, folder, is_special=True)


def further_texts(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that have a name, by name, without those of BOS and EOS.

    Args:
        settings: as ``settings_with_special_tokens`` gives them.
    """
    own = {key: value for key, value in settings.items() if is_model_token(key, value)}
    named = {**{name: settings.get(name) for name in NAMES}, **own, **_model_tokens(settings)}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
    }
    ends = ("bos_token", "eos_token")
    return {
        name: text for name, text in texts.items() if isinstance(text, str) and name not in ends
    }


def is_model_token(key: str, value: object) -> bool:
    """Whether a setting names a token under a name of the model's own."""
    return (
        key.endswith("_token") and key not in (*NAMES, *_SETTINGS) and isinstance(value, str | dict)
    )


def _model_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    value = settings.get(_MODEL)
    return value if isinstance(value, dict) else {}


def _token(value: Any, folder: Path, is_special: object) -> AddedToken:
    if isinstance(value, str):
        value = {"content": value, "normalized": False}
    known = isinstance(value, dict) and set(value) <= {"content", "__type", *FLAGS}
    flags = {**value, "special": is_special} if known else {}
    flags.pop("__type", None)
    content = flags.pop("content", None)
    if not (isinstance(content, str) and all(type(flag) is bool for flag in flags.values())):
        raise CheckpointError(
            f"{folder}: a special token is {value!r:.80}; expected its content and flags"
        )
    return AddedToken(content, **flags)
