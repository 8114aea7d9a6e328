"""Damaged copies: five thousand each of a GGUF, a safetensors folder and a packed one.

Each must open and read, or raise a ThinsliceError, within a MiB. The damage is random but
seeded; a failure names the number of the copy, which alone makes it again.
"""

import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import (
    GgufOptions,
    GgufTokenizer,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
)
from tests.packed_checkpoints import write_packed_model
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ThinsliceError
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import MIB

NUM_COPIES = 1_500
NUM_LONG_COPIES = 5_000
MAX_PEAK_BYTES = MIB

SMALL = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "num_hidden_layers": 1}
ODD_NUMBERS = [
    0,
    1,
    2,
    3,
    31,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63,
    2**64 - 1,
]
ODD_TEXTS = [
    b"-1", b"1e400", b"1.5", b"NaN", b"null", b"true", b"[]", b"{}", b'"x"', b"9" * 30, b"9" * 5000,
    b"[" * 3000, b'"\\ud800"', b'"../../x.safetensors"', b"0", b"1048576",
]  # fmt: skip

Damage = Callable[[random.Random, bytearray, int], None]


def flip(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    for _ in range(rng.randint(1, 4)):
        content[position(rng, content, header_bytes)] ^= 1 << rng.randrange(8)


def overwrite_byte(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    content[position(rng, content, header_bytes)] = rng.randrange(256)


def put_number(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    at = position(rng, content, header_bytes)
    size = rng.choice([1, 2, 4, 8])
    number = rng.choice(ODD_NUMBERS) % 256**size
    content[at : at + size] = number.to_bytes(size, "little")


def truncate(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    del content[position(rng, content, header_bytes) :]


def cut_out(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    at = position(rng, content, header_bytes)
    del content[at : at + rng.randint(1, 40)]


def splice(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    source = position(rng, content, header_bytes)
    piece = content[source : source + rng.randint(1, 60)]
    at = position(rng, content, header_bytes)
    content[at : at + rng.choice([0, len(piece)])] = piece


def put_text(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    """Put something odd in the place of a number or a string of JSON."""
    values = list(re.finditer(rb'-?\d+(\.\d+)?|"[^"]*"', content[:header_bytes]))
    value = rng.choice(values)
    content[value.start() : value.end()] = rng.choice(ODD_TEXTS)


def put_text_of_same_length(rng: random.Random, content: bytearray, header_bytes: int) -> None:
    """Change digits of JSON, so that the length before it stays true."""
    digits = list(re.finditer(rb"\d+", content[:header_bytes]))
    number = rng.choice(digits)
    width = number.end() - number.start()
    content[number.start() : number.end()] = bytes(rng.choices(b"0123456789", k=width))


def position(rng: random.Random, content: bytearray, header_bytes: int) -> int:
    """A place in the file, mostly in its header."""
    end = header_bytes if rng.random() < 0.9 else len(content)
    return rng.randrange(max(min(end, len(content)), 1)) if content else 0


def open_and_read(path: Path, rng: random.Random) -> str:
    """What became of a damaged copy: 'read', or the name of the error."""
    try:
        checkpoint = open_checkpoint(path)
        name = rng.choice(list(checkpoint.tensors))
        size = checkpoint.tensors[name].shape
        start = rng.randrange(size[0])
        with CheckpointReader(checkpoint) as reader:
            entry = checkpoint.tensors[name]
            if entry.is_packed:
                data = np.empty(entry.num_bytes, np.uint8)
                reader.read_bytes(name, 0, size[0], data)
                return "read"
            reader.read(name, np.empty(size, np.float32))
            reader.read_rows(
                name, start, size[0], np.empty((size[0] - start, *size[1:]), np.float32)
            )
    except ThinsliceError as error:
        return type(error).__name__
    return "read"


def open_and_measure(path: Path, number: int) -> tuple[str, int]:
    """What became of copy ``number``, and the most bytes that Python held for it at once."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        outcome = open_and_read(path, random.Random(number))
    except Exception as error:
        raise AssertionError(f"copy {number} of {path}") from error
    return outcome, tracemalloc.get_traced_memory()[1] - before


@pytest.fixture
def num_copies(is_long: bool) -> int:
    return NUM_LONG_COPIES if is_long else NUM_COPIES


def fuzz(
    path: Path, files: dict[Path, int], damages: list[Damage], num_copies: int
) -> Counter[str]:
    """Damage one of ``files`` (path: header size) at a time, open ``path`` and put it back."""
    originals = {file: file.read_bytes() for file in files}
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for number in range(num_copies):
            rng = random.Random(number)
            file = rng.choice(list(files))
            content = bytearray(originals[file])
            for _ in range(rng.choice([1, 1, 1, 2])):
                rng.choice(damages)(rng, content, files[file])
            file.write_bytes(content)
            outcome, peak = open_and_measure(path, number)
            if peak >= MAX_PEAK_BYTES:
                # Python's table of all interned strings, among them the parts of paths, doubles in
                # whichever call comes to that: once. What the reader takes it takes each time.
                outcome, peak = open_and_measure(path, number)
            assert peak < MAX_PEAK_BYTES, f"copy {number} of {file.name}: {peak} bytes"
            outcomes[outcome] += 1
            file.write_bytes(originals[file])
    finally:
        tracemalloc.stop()
    return outcomes


def test_damaged_gguf(tmp_path: Path, num_copies: int) -> None:
    path = tmp_path / "model.gguf"
    shape = shape_from_config(tiny_config(**SMALL))
    tokenizer = GgufTokenizer(tuple(f"t{n}" for n in range(32)), merges=("t 0", "t 1"))
    write_gguf_model(path, shape, options=GgufOptions("Q4_0", tokenizer))
    header_bytes = min(entry.offset for entry in open_checkpoint(path).tensors.values())
    binary = [flip, overwrite_byte, put_number, put_number, truncate, cut_out, splice]
    outcomes = fuzz(path, {path: header_bytes}, binary, num_copies)
    assert set(outcomes) == {"read", "CheckpointError"}
    assert min(outcomes.values()) > num_copies // 50


def test_damaged_packed_checkpoint(tmp_path: Path, num_copies: int) -> None:
    packing = Packing(PackedFormat.INT4, PackedFormat.INT8, 64)
    write_packed_model(tmp_path, tiny_config("MiMoForCausalLM", **SMALL), packing)
    weights = tmp_path / "model.safetensors"
    config = tmp_path / "config.json"
    content = weights.read_bytes()
    header_bytes = 8 + len(content[8 : 8 + int.from_bytes(content[:8], "little")].rstrip())
    files = {config: config.stat().st_size, weights: header_bytes}
    texts = [flip, put_number, truncate, cut_out, splice, put_text, put_text_of_same_length]
    outcomes = fuzz(tmp_path, files, texts, num_copies)
    assert set(outcomes) == {"read", "CheckpointError"}
    assert min(outcomes.values()) > num_copies // 50


def test_damaged_safetensors(tmp_path: Path, num_copies: int) -> None:
    write_safetensors_model(tmp_path, tiny_config("MiMoForCausalLM", **SMALL), shards=2)
    files = {}
    for file in tmp_path.iterdir():
        header_bytes = file.stat().st_size
        if file.suffix == ".safetensors":
            header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        files[file] = header_bytes
    assert len(files) == 4
    texts = [flip, put_number, truncate, cut_out, splice, put_text, put_text_of_same_length]
    outcomes = fuzz(tmp_path, dict(sorted(files.items())), texts, num_copies)
    assert set(outcomes) == {"read", "CheckpointError"}
    assert min(outcomes.values()) > num_copies // 50
