"""Build a tokenizer from the metadata of a GGUF.

Two kinds exist: ``gpt2`` (byte-level BPE with ranked merges) and ``llama`` (SentencePiece BPE with
scores). A GGUF keeps the vocabulary but only names the splitting rule, so the rules are here.

Where llama.cpp and the model's original tokenizer.json differ, the original is followed: Qwen's
normalises text to NFC, and padding such as [PAD151665] is no text at all.

Source: the regular expressions are those of the models' own tokenizer.json files, which llama.cpp
quotes beside its own adaptations (src/llama-vocab.cpp, llm_tokenizer_bpe).
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from thinslice.errors import CheckpointError
from thinslice.text.end_tokens import end_texts

# llama_token_type in llama.cpp's include/llama.h.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Far above any real vocabulary: Gemma has 262,144 tokens, 2 million characters in all.
_MAX_TOKENS = 1 << 20
_MAX_TOKEN_CHARACTERS = 1024
_MAX_VOCAB_CHARACTERS = 8 << 20
_MAX_MERGES = 1 << 21

# Source: openai/gpt-2, src/encoder.py.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No model's own rule: what llama.cpp applies, one after another, where a file says "default".
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class _Splitting:
    """How one tokenizer.ggml.pre cuts text before BPE.

    Attributes:
        patterns: regular expressions, each applied to the pieces that the one before it left.
        ignore_merges: a piece that is a token as a whole stays whole, whatever the merges say.
        prepends_bos: a prompt begins with the BOS token unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    splits_digits: bool = False
    normalises_nfc: bool = False
    ignore_merges: bool = False
    prepends_bos: bool = False


_LLAMA3_SPLITTING = _Splitting((_LLAMA3,), ignore_merges=True, prepends_bos=True)
_QWEN2_SPLITTING = _Splitting((_QWEN2,), normalises_nfc=True)
_SPLITTINGS = {
    "default": _Splitting(_DEFAULT),
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((_GPT2,), splits_digits=True),
    "llama-bpe": _LLAMA3_SPLITTING,
    "llama3": _LLAMA3_SPLITTING,
    "llama-v3": _LLAMA3_SPLITTING,
    "qwen2": _QWEN2_SPLITTING,
    "deepseek-r1-qwen": _QWEN2_SPLITTING,
    "tekken": _Splitting((_TEKKEN,), ignore_merges=True, prepends_bos=True),
}


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    types: list[int]

    def ids(self, *types: int) -> dict[str, int]:
        """The tokens of these types, with their ids."""
        wanted = [token_id for token_id, kind in enumerate(self.types) if kind in types]
        return dict(zip(map(self.tokens.__getitem__, wanted), wanted, strict=True))


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer a GGUF describes; it adds no BOS of its own.

    Control and unknown tokens become special added tokens, user-defined ones plain added tokens;
    all are found in text. A byte that the vocabulary lacks is dropped from the text, as the
    original tokenizer does. Peak extra memory: about 1 kB per token.

    Errors: CheckpointError for another kind of tokenizer or splitting rule, and for arrays that
    are missing, too long, of a wrong type or at odds with each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"GGUF tokenizer {kind!r:.60} is not supported; supported: gpt2 (BPE), "
            "llama (SentencePiece BPE)"
        )
    vocabulary = _read_vocabulary(metadata)
    if kind == "gpt2":
        tokenizer = _byte_level_tokenizer(metadata, vocabulary)
    else:
        tokenizer = _sentencepiece_tokenizer(metadata, vocabulary)
    tokenizer.add_special_tokens(_added_tokens(vocabulary, _CONTROL, _UNKNOWN))
    tokenizer.add_tokens(_added_tokens(vocabulary, _USER_DEFINED))
    return tokenizer


def prepends_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with the BOS token.

    Source: llama.cpp, src/llama-vocab.cpp: the file's own word, else the default of the kind.
    """
    if "tokenizer.ggml.add_bos_token" in metadata:
        return _flag(metadata, "tokenizer.ggml.add_bos_token")
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return _splitting(metadata).prepends_bos


def _splitting(metadata: Mapping[str, Any]) -> _Splitting:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _SPLITTINGS:
        raise CheckpointError(
            f"GGUF pre-tokenizer {name!r:.60} is not supported, and text split by another rule "
            f"would be other tokens; supported: {', '.join(_SPLITTINGS)}"
        )
    return _SPLITTINGS[name]


def _byte_level_tokenizer(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    splitting = _splitting(metadata)
    ids = vocabulary.ids(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    merges = _read_merges(metadata, ids)
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.ignore_merges)
    )
    if splitting.normalises_nfc:
        tokenizer.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if splitting.splits_digits else []
    splits = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in splitting.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, *splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    """The components of Llama 2's tokenizer.json, whose text after an added token gets a space
    before it as the text's start does; llama.cpp does the same."""
    key = "tokenizer.ggml.add_space_prefix"
    has_prefix = _flag(metadata, key) if key in metadata else True
    byte_ids = vocabulary.ids(_BYTE)
    missing = [token for token in map("<0x{:02X}>".format, range(256)) if token not in byte_ids]
    if missing:
        raise CheckpointError(
            f"GGUF tokenizer: {len(missing)} of 256 byte tokens are missing, {missing[0]} first"
        )
    ids = vocabulary.ids(_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    merges = _merges_from_scores(vocabulary, _read_scores(metadata, len(vocabulary.tokens)))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first.

    Source: transformers, convert_slow_tokenizer.py (generate_merges), also for the order of two
    ways to one token.
    """
    ids = vocabulary.ids(_NORMAL)
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((scores[token_id], len(left), len(right), left, right))
    if len(ranked) > _MAX_MERGES:
        raise CheckpointError(f"GGUF tokenizer: over {_MAX_MERGES} merges follow from its scores")
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in ranked]


def _added_tokens(vocabulary: _Vocabulary, *types: int) -> list[AddedToken]:
    return [AddedToken(token, normalized=False) for token in vocabulary.ids(*types)]


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _strings(metadata, "tokenizer.ggml.tokens", _MAX_TOKENS)
    types = _numbers(metadata, "tokenizer.ggml.token_type", (int,), len(tokens))
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("GGUF tokenizer: a token appears twice in tokenizer.ggml.tokens")
    if max(map(len, tokens)) > _MAX_TOKEN_CHARACTERS:
        raise CheckpointError(
            f"GGUF tokenizer: a token has over {_MAX_TOKEN_CHARACTERS} characters"
        )
    if sum(map(len, tokens)) > _MAX_VOCAB_CHARACTERS:
        raise CheckpointError(
            f"GGUF tokenizer: tokens have over {_MAX_VOCAB_CHARACTERS} characters"
        )
    ends = end_texts(set(tokens))
    # Converters fill a vocabulary up to the embedding's rows; some mark the filling user-defined.
    for token_id, token in enumerate(tokens):
        if token in ends:
            # Whatever the file calls it, as llama.cpp does.
            types[token_id] = _CONTROL
        elif not token or (token[0] == "[" and token == f"[PAD{token_id}]"):
            types[token_id] = _UNUSED
    return _Vocabulary(tokens, types)


class _Merges(Sequence[tuple[str, str]]):
    """Pairs of tokens, each made when it is read: as many tuples at once would leave holes in
    Python's heap, a MiB of it around what later comes to lie there.

    Args:
        lines: of two tokens each, with a space between them.
    """

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place: Any) -> Any:
        left, _, right = self._lines[place].partition(" ")
        return left, right


def _read_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> _Merges:
    lines = _strings(metadata, "tokenizer.ggml.merges", _MAX_MERGES)
    for line in lines:
        left, space, right = line.partition(" ")
        if not space or left not in ids or right not in ids or left + right not in ids:
            raise CheckpointError(f"GGUF tokenizer: merge {line!r:.80} is not of known tokens")
    return _Merges(lines)


def _read_scores(metadata: Mapping[str, Any], num_tokens: int) -> list[float]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", (int, float), num_tokens)
    if not all(map(math.isfinite, scores)):
        raise CheckpointError("GGUF tokenizer: tokenizer.ggml.scores holds no number for a token")
    return scores


def _flag(metadata: Mapping[str, Any], key: str) -> bool:
    value = metadata[key]
    if not isinstance(value, bool):
        raise CheckpointError(f"GGUF tokenizer: {key} is {value!r:.40}; expected true or false")
    return value


def _strings(metadata: Mapping[str, Any], key: str, max_length: int) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise CheckpointError(f"GGUF tokenizer: {key} is missing or not a list of strings")
    if len(value) > max_length:
        raise CheckpointError(f"GGUF tokenizer: {key} has {len(value)} entries, over {max_length}")
    if not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(f"GGUF tokenizer: {key} is not a list of strings")
    return list(value)


def _numbers(
    metadata: Mapping[str, Any], key: str, types: tuple[type, ...], length: int
) -> list[Any]:
    value = metadata.get(key)
    values = value.tolist() if isinstance(value, array) else value
    if not isinstance(values, list) or not all(type(entry) in types for entry in values):
        raise CheckpointError(f"GGUF tokenizer: {key} is missing or not a list of numbers")
    if len(values) != length:
        raise CheckpointError(
            f"GGUF tokenizer: {key} has {len(values)} entries for {length} tokens"
        )
    return values
