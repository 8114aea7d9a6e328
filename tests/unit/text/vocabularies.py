"""Small vocabularies as GGUF metadata."""

from typing import Any

from thinslice.text.tokenizer import BYTE_TO_CHARACTER

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_level(pre: str = "qwen2", words: str = "", **changes: Any) -> dict[str, Any]:
    """All bytes, the merges that make the words left to right, and some added tokens."""
    tokens = list(BYTE_TO_CHARACTER)
    merges: list[str] = []
    for word in words.split():
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    types = [NORMAL] * len(tokens)
    added = {"<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<think>": USER_DEFINED}
    tokens += [*added, f"[PAD{len(tokens) + len(added)}]"]
    types += [*added.values(), USER_DEFINED]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges or ["a b"],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }
    if not merges:
        tokens.append("ab")
        types.append(NORMAL)
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def sentencepiece(pieces: str, **changes: Any) -> dict[str, Any]:
    """Bytes, the characters of the pieces, and the pieces, best first."""
    words = pieces.split()
    characters = sorted({*"".join(words), "▁"})
    tokens = ["<unk>", "<s>", "</s>", *map("<0x{:02X}>".format, range(256)), *characters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(characters)]
    scores = [0.0] * 259 + [-1000.0 - idx for idx in range(len(characters))]
    for rank, word in enumerate(word for word in words if len(word) > 1):
        tokens.append(word)
        types.append(NORMAL)
        scores.append(-float(rank))
    tokens.append("<sep>")
    types.append(USER_DEFINED)
    scores.append(0.0)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
