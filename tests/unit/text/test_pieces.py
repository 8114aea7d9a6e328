"""Encoding piece by piece: the tokens of the whole text for every kind of tokenizer, bounded."""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.unit.text import vocabularies
from thinslice.errors import CheckpointError, RequestError
from thinslice.text.gguf_tokenizer import build_gguf_tokenizer
from thinslice.text.mergers import AtMerges, AtSplits, Sizes
from thinslice.text.pieces import PieceEncoder
from thinslice.text.split_points import cut_test

WORDS = "hello he world ab aa aaaa ll lo the ing 12 --"
PIECES = "▁he ▁hello llo he ll ▁▁ ▁▁▁▁ aa aaaa aaa é ▁a"
# What tokenizers trip over: runs, spaces, marks that join, byte fallback, added tokens, halves.
ATOMS = [
    *("hello", "he", " ", "  ", "\n", "a", "aa", "lo", "l", "é", "e\u0301", "\u0301", "😀", "हि"),
    *(
        "न्दी",
        "你好",
        "。",
        "1",
        "23",
        "<|im_start|>",
        "<|im_end|>",
        "<|im",
        "<think>",
        "<x>",
        "Hello<",
    ),
    *("he wo", "'s", "'ll", "\t", "\r\n", "\ufb01", "\uff9e", "\uff76", "가", "\u1161", "\u1100"),
    *("İ", "ß", "-", "--", "!", "\u00a0", "\u3000", "▁", "\x1c", "\x00"),
]


def byte_level(rule: str = "gpt-2") -> Tokenizer:
    return build_gguf_tokenizer(vocabularies.byte_level(rule, WORDS))


def sentencepiece(**options: Any) -> Tokenizer:
    return build_gguf_tokenizer(vocabularies.sentencepiece(PIECES, **options))


def with_pre_tokenizer(backend: Tokenizer, pre_tokenizer: Any) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizer
    return backend


def metaspace(scheme: str, split: bool) -> Tokenizer:
    backend = sentencepiece()
    backend.normalizer = normalizers.Sequence([])
    return with_pre_tokenizer(backend, pre_tokenizers.Metaspace("▁", scheme, split))


def normalising() -> Tokenizer:
    """A normaliser of several steps, and added tokens that are looked for behind it."""
    backend = byte_level("qwen2")
    replace = normalizers.Replace("ß", "ss")
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), replace]
    )
    backend.add_tokens(
        [
            AddedToken("Hello<", normalized=True),
            AddedToken("<x>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("he wo", rstrip=True, normalized=True),
        ]
    )
    return backend


BACKENDS = {
    **{
        rule: byte_level(rule)
        for rule in ("smollm", "gpt-2", "qwen2", "llama3", "tekken", "default")
    },
    "sentencepiece": sentencepiece(),
    "without prefix": sentencepiece(add_space_prefix=False),
    **{
        f"metaspace {scheme} {split}": metaspace(scheme, split)
        for scheme in ("always", "first", "never")
        for split in (True, False)
    },
    "prefix space": with_pre_tokenizer(byte_level(), pre_tokenizers.ByteLevel(True)),
    "unsplit": with_pre_tokenizer(byte_level(), pre_tokenizers.ByteLevel(False, use_regex=False)),
    "normalising": normalising(),
}


def texts(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    drawn = []
    for _ in range(count):
        some = source.sample(ATOMS, source.randrange(1, len(ATOMS)))
        drawn.append("".join(source.choice(some) for _ in range(source.randrange(60))))
    return drawn


def num_wrong(backend: Tokenizer, drawn: list[str]) -> tuple[int, int]:
    """How many texts have other tokens in pieces than as a whole, and how many are refused."""
    encoders = [PieceEncoder(backend, sizes) for sizes in (Sizes(4, 32), Sizes(9, 64))]
    wrong = refused = 0
    for index, text in enumerate(drawn):
        expected = backend.encode(text, add_special_tokens=False).ids
        try:
            wrong += encoders[index % 2].encode(text) != expected
        except RequestError:
            refused += 1
    return wrong, refused


@pytest.mark.parametrize("kind", BACKENDS)
def test_pieces_have_the_tokens_of_the_whole_text(kind: str) -> None:
    drawn = texts(len(kind), 100)
    wrong, refused = num_wrong(BACKENDS[kind], drawn)
    assert wrong == 0
    assert refused < len(drawn) / 2


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "sentencepiece", "unsplit"])
def test_cut_anywhere_other_tokens_come(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test above must see."""

    def anywhere(self: Any, text: str) -> tuple[int, list[int]]:
        place = len(text) // 2
        return place, self.backend.encode(text[:place], add_special_tokens=False).ids

    def merge_anywhere(self: Any, parts: Any) -> Any:
        for part in parts:
            yield self.backend.encode(part, add_special_tokens=False).ids

    monkeypatch.setattr(AtSplits, "_cut", anywhere)
    monkeypatch.setattr(AtMerges, "merge", merge_anywhere)
    assert num_wrong(BACKENDS[kind], texts(len(kind), 100))[0] > 0


def test_merges_in_any_order_stand_where_they_are_cut() -> None:
    """Tables in which a merge makes way for one that comes before it."""
    source = random.Random(5)
    for _ in range(60):
        vocab, merges = ["a", "b", "c", "<unk>"], []
        for _ in range(source.randrange(1, 25)):
            left, right = (source.choice([one for one in vocab if one != "<unk>"]) for _ in "12")
            if (left, right) not in merges and len(left + right) <= 12:
                merges.append((left, right))
                vocab += [left + right] if left + right not in vocab else []
        source.shuffle(merges)
        ids = {token: token_id for token_id, token in enumerate(vocab)}
        model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=source.random() < 0.5)
        backend = Tokenizer(model)
        drawn = ["".join(source.choices("aabbcX", k=source.randrange(30, 90))) for _ in range(10)]
        wrong, refused = num_wrong(backend, drawn)
        assert (wrong, refused) == (0, 0) or (wrong == 0 and refused < 8)


@pytest.mark.parametrize(
    ("pattern", "apart", "together"),
    [
        (r"\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+", [("a", " "), ("a", "1")], [("a", "b"), (" ", "!")]),
        (r"[^\r\n\p{L}\p{N}]?\p{L}+", [("a", ","), ("1", "a")], [(",", "a"), (" ", "a")]),
        (r"(?i:'s|'t)|[a-z]{1,3}", [("a", "1")], [("a", "b"), ("'", "s")]),
        (r"(\s*[\r\n]+|x)+", [(" ", "1")], [("\n", "x"), (" ", "\n")]),
    ],
)
def test_places_that_no_match_can_hold(
    pattern: str, apart: list[tuple[str, str]], together: list[tuple[str, str]]
) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    may_cut = cut_test([split])
    assert may_cut is not None
    assert all(may_cut(left, right) for left, right in apart)
    assert not any(may_cut(left, right) for left, right in together)


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(?<=a)b", r"a(?=b)", r"\bword", r"(a)\1", "^a", "a(?!b)", r"[a-z&&[^b]]"],
)
def test_what_looks_further_is_never_cut(pattern: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    assert cut_test([split]) is None


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama3", "sentencepiece", "unsplit"])
@pytest.mark.parametrize("atom", ["यह हिन्दी है ", "😀", " ", "a", "\ufffd\x00é,"])
def test_five_megabytes_take_little_memory(kind: str, atom: str) -> None:
    """Tokens up to the limit, or a refusal of a run that has no place to cut it in."""
    text = atom * (5_000_000 // len(atom.encode()))
    encoder = PieceEncoder(BACKENDS[kind])
    _reset_peak()
    before = _peak_bytes()
    is_run = kind in ("gpt-2", "qwen2", "llama3") and len(atom) == 1
    with pytest.raises(RequestError, match="takes as one word") if is_run else nullcontext():
        assert 4096 < len(encoder.encode(text, 4096)) < 20_000
    assert _peak_bytes() - before < 16 << 20


def test_encoding_stops_past_the_limit() -> None:
    encoder = PieceEncoder(BACKENDS["qwen2"], Sizes(16, 64))
    text = "hello world. " * 500
    assert len(encoder.encode(text)) > 1000
    assert 100 < len(encoder.encode(text, 100)) < 200


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("z", "y" * 100_000),
        normalizers.Replace(Regex("z*"), "y" * 100_000),
        normalizers.Sequence([normalizers.Replace("z", "z" * 20)] * 4),
        normalizers.Prepend("y" * 100_000),
    ],
)
def test_a_normaliser_that_makes_much_of_little_is_refused(normalizer: Any) -> None:
    backend = byte_level()
    backend.normalizer = normalizer
    with pytest.raises(CheckpointError, match="characters of one"):
        PieceEncoder(backend)


def test_what_a_normaliser_makes_counts_and_not_what_it_is_given() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Replace("z", "y" * 4000)
    encoder = PieceEncoder(backend)
    _reset_peak()
    before = _peak_bytes()
    with pytest.raises(RequestError, match="takes as one word"):
        encoder.encode("z" * 2000, 512)
    assert _peak_bytes() - before < 16 << 20


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
