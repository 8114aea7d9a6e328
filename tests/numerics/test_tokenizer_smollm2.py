"""SmolLM2's tokenizer against a second one in plain Python and against llama.cpp's ids.

transformers' own reading of the GGUF is no reference: it forgets that digits are split one by one.
llama.cpp differs from the original tokenizer.json in one thing, which no line here has: it drops
the 21 bytes the vocabulary lacks after merging their neighbours, not before.

``python -m tests.numerics.test_tokenizer_smollm2 MODEL.gguf`` writes the golden file anew; it needs
llama-cpp-python.
"""

import hashlib
import importlib
import json
import random
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import regex

from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.text.incremental import IncrementalDetokenizer
from thinslice.text.tokenizer import BYTE_TO_CHARACTER, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_tokens.json"
NUM_MIXED_LINES = 3000

# One of each kind; random lines mix them.
PIECES = {
    "code": ["def f(x):\n    return x**2", "for(i=0;i<10;i++){", "#include <a.h>\r\n", "\\u00e9"],
    "words": ["the quick brown", " fox", " It's we'LL I'd", "antidisestablishment", "CamelCase"],
    "numbers": ["0", "1234567890", " 3.14159e-10", "²½Ⅷ", "١٢٣", "१२३", "0x7fff"],
    "spaces": [" ", "    ", "\t\t", "\n", "\r\n", "\n\n\n", " \n ", "\u00a0", "\u3000", "\u2028"],
    "emoji": ["😀", "👩‍👩‍👧", "🇮🇳", "👍🏽", "☃️"],
    "scripts": ["नमस्ते दुनिया", "ক্ষুধার্ত বাংলা", "中文字符", "日本語", "مرحبا بالعالم", "שלום", "Привет"],
    "marks": ["e\u0301", "é", "ǅ", "ß", "\u200b", "\ufeff", "—", "…", "<|", "$+=<>^~|", "''"],
    "specials": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", " <|im_end|> "],
    "controls": ["\x00", "\x01\x02", "\x1b[0m", "\x7f"],
}


def mixed_lines() -> list[str]:
    """The same lines on every machine: Random.random is fixed by its seed, Random.choice is not."""
    source = random.Random(20)
    pieces = [piece for group in PIECES.values() for piece in group]
    return [
        "".join(
            pieces[int(source.random() * len(pieces))] for _ in range(int(source.random() * 16))
        )
        for _ in range(NUM_MIXED_LINES)
    ]


def golden_lines() -> list[str]:
    """Lines whose ids the golden file shows in full."""
    return [piece for group in PIECES.values() for piece in group] + mixed_lines()[:60]


def digest(lists: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(lists, separators=(",", ":")).encode()).hexdigest()


class PlainTokenizer:
    """Byte-level BPE as its papers tell it: merge the best ranked pair until there is none."""

    # As SmolLM2's tokenizer.json: numeric characters one by one, then GPT-2's rule.
    RULE = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", regex.VERSION0
    )

    def __init__(self, metadata: Mapping[str, list]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self._ids = {token: token_id for token_id, token in enumerate(tokens)}
        merges = metadata["tokenizer.ggml.merges"]
        self._ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
        self._specials = regex.compile("(" + "|".join(map(regex.escape, control)) + ")")
        self._piece_ids = cache(self._merge)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for idx, part in enumerate(self._specials.split(text)):
            if idx % 2:
                ids.append(self._ids[part])
                continue
            for run in regex.split(r"(\p{N})", part):
                pieces = [run] if regex.fullmatch(r"\p{N}", run) else self.RULE.findall(run)
                ids += [token_id for piece in pieces for token_id in self._piece_ids(piece)]
        return ids

    def _merge(self, piece: str) -> list[int]:
        parts = [BYTE_TO_CHARACTER[byte] for byte in piece.encode()]
        parts = [part for part in parts if part in self._ids]
        while len(parts) > 1:
            ranked = [self._ranks.get(pair, 1 << 30) for pair in pairwise(parts)]
            best = min(range(len(ranked)), key=ranked.__getitem__)
            if ranked[best] == 1 << 30:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [self._ids[part] for part in parts]


@pytest.fixture(scope="module")
def checkpoint(smollm2_path: Path) -> Checkpoint:
    return open_checkpoint(smollm2_path)


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def mixed_ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(line, add_special_tokens=False) for line in mixed_lines()]


def test_ids_equal_a_plain_python_bpe(
    checkpoint: Checkpoint, tokenizer: Tokenizer, mixed_ids: list[list[int]]
) -> None:
    plain = PlainTokenizer(checkpoint.metadata)
    for line, ids in zip(mixed_lines(), mixed_ids, strict=True):
        assert ids == plain.encode(line), repr(line)


def test_ids_equal_those_of_llama_cpp(tokenizer: Tokenizer, mixed_ids: list[list[int]]) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert [text for text, _ in golden["lines"]] == golden_lines()
    for text, ids in golden["lines"]:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
    assert digest(mixed_ids) == golden["mixed_lines_sha256"]


@pytest.mark.parametrize("text", ["a\x04b", "\x04", "\U00040000", "q\x1d \U000b1f5f\U00065df5l"])
def test_bytes_that_the_vocabulary_lacks_are_dropped(
    checkpoint: Checkpoint, tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == PlainTokenizer(checkpoint.metadata).encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) != text.encode()


def test_round_trip_is_exact(tokenizer: Tokenizer, mixed_ids: list[list[int]]) -> None:
    for line, ids in zip(mixed_lines(), mixed_ids, strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=False) == line


def test_stream_equals_decoding(tokenizer: Tokenizer, mixed_ids: list[list[int]]) -> None:
    for ids in mixed_ids[:500]:
        # The last token is left out, so that some streams end within a character.
        detokenizer = IncrementalDetokenizer(tokenizer)
        pieces = [detokenizer.push(token_id) for token_id in ids[:-1]]
        assert "".join([*pieces, detokenizer.finish()]) == tokenizer.decode(ids[:-1])


def test_every_token_has_its_bytes(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Random ids decode as ``tokenizers`` decodes them, also where bytes are no character."""
    source = random.Random(7)
    ids = [token_id for token_id in range(tokenizer.vocab_size) if source.random() < 0.2]
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    to_byte = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}
    for token_id in ids:
        if token_id in tokenizer.special_token_ids:
            assert tokenizer.token_bytes(token_id) == tokens[token_id].encode()
        else:
            expected = bytes(to_byte[character] for character in tokens[token_id])
            assert tokenizer.token_bytes(token_id) == expected


def test_special_tokens_are_those_of_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49_152
    assert tokenizer.special_token_ids == frozenset(range(17))
    assert tokenizer.special.prompt_prefix_ids == ()
    # <reponame> stands between files; llama.cpp ends a generation there too.
    assert tokenizer.special.eos_token_ids == frozenset({0, 2, 4})
    assert tokenizer.token_bytes(4) == b"<reponame>"
    assert (tokenizer.special.bos_token, tokenizer.special.eos_token) == (
        "<|im_start|>",
        "<|im_end|>",
    )
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>", add_special_tokens=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "user\nHi"


def write_golden(encode: Callable[[str], list[int]], made_by: str) -> None:
    lines = [json.dumps([text, encode(text)]) for text in golden_lines()]
    checksum = json.dumps(digest([encode(line) for line in mixed_lines()]))
    body = ",\n".join(lines)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        f'{{"made_by": {json.dumps(made_by)},\n'
        f'"mixed_lines_sha256": {checksum},\n"lines": [\n{body}\n]}}\n'
    )


if __name__ == "__main__":
    llama_cpp = importlib.import_module("llama_cpp")
    llama = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
    write_golden(
        lambda text: llama.tokenize(text.encode(), add_bos=False, special=True),
        f"SmolLM2-135M-Instruct.Q4_1.gguf, llama-cpp-python {llama_cpp.__version__}, vocab only",
    )
