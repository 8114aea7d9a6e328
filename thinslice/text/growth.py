"""How much longer the steps before the merges can make a text: what comes out is bounded too."""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from thinslice.errors import CheckpointError

# NFKC makes 18 characters of U+FDFA, and the byte alphabet 4 of one.
_MAX_GROWTH = 4096
# The most characters of one, in any version of Unicode so far.
_FIXED = {
    "NFC": 3,
    "NFD": 4,
    "NFKC": 18,
    "NFKD": 18,
    "Lowercase": 3,
    "BertNormalizer": 12,
    "ByteLevel": 4,
}


def growth(steps: Iterable[Mapping[str, Any]]) -> int:
    """The most characters that a normaliser's or pre-tokenizer's steps make of one.

    Errors: CheckpointError beyond 4096.
    """
    product = 1
    for step in steps:
        product *= _of_step(step)
        if product > _MAX_GROWTH:
            raise CheckpointError(
                f"the tokenizer's {step['type']} makes over {_MAX_GROWTH} characters of one; "
                "no known tokenizer does"
            )
    return product


def _of_step(step: Mapping[str, Any]) -> int:
    kind = step["type"]
    if kind == "Replace":
        pattern, content = step["pattern"].get("String"), step["content"]
        # An expression may match the nothing between two characters.
        return -(-len(content) // len(pattern)) or 1 if pattern else 1 + len(content)
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "Precompiled":
        return _longest_replacement(base64.b64decode(step["precompiled_charsmap"]))
    return _FIXED.get(kind, 1)


def _longest_replacement(charsmap: bytes) -> int:
    """Source: SentencePiece, normalizer.cc: a trie behind its size, then texts that end in 0."""
    start = 4 + int.from_bytes(charsmap[:4], "little")
    return max((len(text) for text in charsmap[start:].split(b"\0")), default=1) or 1
