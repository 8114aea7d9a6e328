"""GGUF headers: what gguf.GGUFWriter wrote, split files, speed, and every way a header can lie."""

import array
import math
import shutil
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model
from thinslice.checkpoint.gguf_header import READABLE_TYPES, read_gguf, read_gguf_header
from thinslice.errors import CheckpointError
from thinslice.plan.shape_from_config import shape_from_config

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10


def text(value: bytes | str) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def pair(key: str, value_type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + value


def info(name: str = "t", dims: tuple[int, ...] = (4, 2), ggml_type: int = 0, at: int = 0) -> bytes:
    """A tensor info; ``dims`` as the file has them, columns first."""
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", ggml_type, at)


@dataclass
class RawGguf:
    """A GGUF put together by hand, so that any part of it can be wrong."""

    pairs: list[bytes] = field(default_factory=list)
    infos: list[bytes] = field(default_factory=lambda: [info()])
    data: bytes = bytes(32)
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    counts: tuple[int, int] | None = None

    def write(self, path: Path) -> Path:
        counts = self.counts or (len(self.infos), len(self.pairs))
        header = self.magic + self.version + struct.pack("<QQ", *counts)
        header += b"".join(self.pairs) + b"".join(self.infos)
        path.write_bytes(header + bytes(-len(header) % 32) + self.data)
        return path


def test_text_of_another_encoding_is_an_error_only_where_it_is_asked_for(tmp_path: Path) -> None:
    words = struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xe9")
    pairs = [
        pair("general.comment", STRING, text("caf\xe9".encode("latin-1"))),
        pair("list", ARRAY, words),
        text(b"\xff.key") + struct.pack("<I", U32) + struct.pack("<I", 7),
        pair("general.name", STRING, text("café")),
    ]
    infos = [text(b"\xfft") + info()[len(text("t")) :]]
    header = read_gguf_header(RawGguf(pairs, infos).write(tmp_path / "model.gguf"))
    assert header.metadata["general.name"] == "café"
    assert header.metadata["\\xff.key"] == 7
    assert set(header.tensors) == {"\\xfft"}
    for key in ("general.comment", "list"):
        assert key in set(header.metadata)
        with pytest.raises(CheckpointError, match=f"the text of '{key}' is not UTF-8"):
            header.metadata.get(key)


def test_metadata_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "käse",
    }
    for kind, value in numbers.items():
        getattr(writer, f"add_{kind}")(f"key.{kind}", value)
    arrays: dict[str, list[Any]] = {
        "key.ints": [1, -2, 3],
        "key.floats": [0.5, -1.5],
        "key.strings": ["a", "", "ö" * 300],
        "key.bools": [True, False, True],
    }
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    metadata = dict(read_gguf_header(path).metadata)
    assert metadata.pop("general.architecture") == "llama"
    assert isinstance(metadata["key.ints"], array.array)
    assert isinstance(metadata["key.floats"], array.array)
    found = {
        key: list(value) if isinstance(value, array.array) else value
        for key, value in metadata.items()
    }
    assert found == {f"key.{kind}": value for kind, value in numbers.items()} | arrays
    assert found["key.bool"] is True


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q5_1"])
def test_entries_are_those_of_the_gguf_package(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_model(path, shape_from_config(tiny_config()), options=GgufOptions(dtype))
    entries = read_gguf_header(path).tensors
    reference = gguf.GGUFReader(path)
    assert set(entries) == {tensor.name for tensor in reference.tensors}
    for tensor in reference.tensors:
        entry = entries[tensor.name]
        assert entry.shape == tuple(int(size) for size in tensor.shape[::-1])
        assert entry.dtype == tensor.tensor_type.name
        assert (entry.offset, entry.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert (entry.path, entry.rotary_heads) == (path, 0)


def test_alignment_moves_the_data(tmp_path: Path) -> None:
    aligned = RawGguf(pairs=[pair("general.alignment", U32, struct.pack("<I", 256))])
    aligned.data = bytes(512)
    entry = read_gguf_header(aligned.write(tmp_path / "model.gguf")).tensors["t"]
    assert entry.offset == 256


def test_version_2_reads_like_version_3(tmp_path: Path) -> None:
    raw = RawGguf(version=struct.pack("<I", 2))
    assert "t" in read_gguf_header(raw.write(tmp_path / "model.gguf")).tensors


def test_every_readable_type_can_be_dequantised() -> None:
    for name in READABLE_TYPES:
        ggml_type = gguf.GGMLQuantizationType[name]
        num_values, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        values = gguf.dequantize(np.zeros((3, num_bytes), dtype=np.uint8), ggml_type)
        assert values.shape == (3, num_values)


@pytest.mark.parametrize("ggml_type", gguf.GGMLQuantizationType)
def test_types_are_read_or_refused_by_name(
    tmp_path: Path, ggml_type: gguf.GGMLQuantizationType
) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    raw = RawGguf(infos=[info(dims=(block_size, 3), ggml_type=ggml_type.value)])
    raw.data = bytes(3 * block_bytes)
    path = raw.write(tmp_path / "model.gguf")
    if ggml_type.name in READABLE_TYPES:
        assert read_gguf_header(path).tensors["t"].num_bytes == 3 * block_bytes
    else:
        message = rf"tensor 't' is {ggml_type.name}, which cannot be read; readable are F32, F16"
        with pytest.raises(CheckpointError, match=message):
            read_gguf_header(path)


def test_a_large_vocabulary_takes_less_than_half_a_second(tmp_path: Path) -> None:
    tokens = b"".join(text(f"token{number}") for number in range(150_000))
    merges = b"".join(text(f"to ken{number}") for number in range(150_000))
    counted = struct.pack("<IQ", STRING, 150_000)
    raw = RawGguf(
        pairs=[
            pair("tokenizer.ggml.tokens", ARRAY, counted + tokens),
            pair("tokenizer.ggml.merges", ARRAY, counted + merges),
            pair("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ", F32, 150_000) + bytes(600_000)),
        ]
    )
    path = raw.write(tmp_path / "model.gguf")
    seconds = []
    for _ in range(3):
        start = time.process_time()
        metadata = read_gguf_header(path).metadata
        seconds.append(time.process_time() - start)
    assert metadata["tokenizer.ggml.tokens"][149_999] == "token149999"
    assert metadata["tokenizer.ggml.merges"][0] == "to ken0"
    assert len(metadata["tokenizer.ggml.scores"]) == 150_000
    assert min(seconds) < 0.5


HUGE = struct.pack("<Q", 2**64 - 1)
LIES: list[tuple[str, RawGguf]] = [
    ("at byte 4: no GGUF file: it does not begin with GGUF", RawGguf(magic=b"GGML")),
    ("GGUF version 1; versions 2 and 3 are supp", RawGguf(version=struct.pack("<I", 1))),
    ("GGUF version 0; versions 2 and 3 are supp", RawGguf(version=bytes(4))),
    (
        "a big-endian GGUF; only little-endian ones are supported",
        RawGguf(version=struct.pack(">I", 3)),
    ),
    ("18446744073709551615 tensors and 0 keys; at most 65536", RawGguf(counts=(2**64 - 1, 0))),
    ("1 tensors and 65537 keys; at most 65536", RawGguf(counts=(1, 65537))),
    ("asks for 4 bytes where 0 are left", RawGguf(counts=(9, 0), infos=[], data=b"")),
    ("a string of 18446744073709551615 bytes; at most 65536", RawGguf(pairs=[HUGE])),
    ("the header asks for 60000 bytes where", RawGguf(pairs=[struct.pack("<Q", 60_000)])),
    ("key 'a' appears twice", RawGguf(pairs=[pair("a", U8, b"\1"), pair("a", U8, b"\1")])),
    ("a truth value is neither 0 nor 1", RawGguf(pairs=[pair("a", BOOL, b"\2")])),
    ("unknown value type 13", RawGguf(pairs=[pair("a", 13, b"")])),
    ("a string of 18446744073709551615 bytes", RawGguf(pairs=[pair("a", STRING, HUGE)])),
    (
        "asks for 147573952589676412920 bytes",
        RawGguf(pairs=[pair("a", ARRAY, struct.pack("<I", STRING) + HUGE)]),
    ),
    (
        "asks for 73786976294838206460 bytes",
        RawGguf(pairs=[pair("a", ARRAY, struct.pack("<I", F32) + HUGE)]),
    ),
    (
        "asks for 1099511627776 bytes",
        RawGguf(pairs=[pair("a", ARRAY, struct.pack("<IQ", BOOL, 1 << 40))]),
    ),
    (
        "asks for 18446744073709551615 bytes",
        RawGguf(pairs=[pair("a", ARRAY, struct.pack("<IQ", STRING, 1) + HUGE)]),
    ),
    (
        "unsupported array of type 9",
        RawGguf(pairs=[pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 2000)]),
    ),
    ("tensor 't' has 0 dimensions; expected 1 to 4", RawGguf(infos=[info(dims=())])),
    ("tensor 't' has 5 dimensions; expected 1 to 4", RawGguf(infos=[info(dims=(1,) * 5)])),
    ("tensor 't' of type F32 has shape \\(0, 4\\)", RawGguf(infos=[info(dims=(4, 0))])),
    ("tensor 't' of type Q4_0 has shape \\(2, 16\\)", RawGguf(infos=[info("t", (16, 2), 2)])),
    ("tensor 't' of type Q4_0 has shape \\(32,\\)", RawGguf(infos=[info(dims=(32,), ggml_type=2)])),
    ("tensor 't' is type 999, which cannot be read", RawGguf(infos=[info(ggml_type=999)])),
    ("tensor 't' appears twice", RawGguf(infos=[info(), info()])),
    ("truncated: tensor 't' ends after its 128 bytes", RawGguf(infos=[info(dims=(4, 3))])),
    ("truncated: tensor 't' ends after", RawGguf(infos=[info(at=1)])),
    ("truncated: tensor 't' ends after", RawGguf(infos=[info(at=2**64 - 1)])),
    ("truncated: tensor 't' ends after", RawGguf(infos=[info(dims=(2**63, 2**63, 2**63, 2))])),
    ("truncated: tensor 't' ends after its 127 bytes; download", RawGguf(data=bytes(31))),
]


@pytest.mark.parametrize(("message", "raw"), LIES, ids=[lie[0] for lie in LIES])
def test_headers_that_lie(tmp_path: Path, message: str, raw: RawGguf) -> None:
    path = raw.write(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize(
    "value",
    [
        (U32, struct.pack("<I", 0)),
        (U32, struct.pack("<I", 24)),
        (U32, struct.pack("<I", 1 << 21)),
        (I8, struct.pack("<b", -32)),
        (F32, struct.pack("<f", 32.0)),
        (BOOL, b"\1"),
        (STRING, text("32")),
        (U64, struct.pack("<Q", 1 << 63)),
    ],
)
def test_alignments_that_are_none(tmp_path: Path, value: tuple[int, bytes]) -> None:
    path = RawGguf(pairs=[pair("general.alignment", *value)]).write(tmp_path / "bad.gguf")
    with pytest.raises(CheckpointError, match=r"general\.alignment is "):
        read_gguf_header(path)


def test_every_truncation_of_a_header_is_an_error(tmp_path: Path) -> None:
    raw = RawGguf(pairs=[pair("a", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz"))])
    content = raw.write(tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    num_bytes = 80 << 20
    raw = RawGguf(pairs=[pair("a", ARRAY, struct.pack("<IQ", F32, num_bytes // 4))]).write(path)
    with raw.open("r+b") as file:
        file.truncate(num_bytes + 1000)
    with pytest.raises(CheckpointError, match=f"asks for {num_bytes} bytes where 67108"):
        read_gguf_header(path)


def write_parts(folder: Path) -> list[Path]:
    """A model in three parts, as GGUFWriter splits it."""
    folder.mkdir(exist_ok=True)
    shape = shape_from_config(tiny_config(num_hidden_layers=1))
    write_gguf_model(folder / "model.gguf", shape, options=GgufOptions(max_tensors=4))
    return sorted(folder.iterdir())


def test_split_file_opens_by_any_part(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    assert [part.name for part in parts] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    alone = [read_gguf_header(part).tensors for part in parts]
    for part in parts:
        header, files = read_gguf(part)
        assert files == tuple(parts)
        assert header.metadata["general.architecture"] == "llama"
        assert header.tensors == {**alone[0], **alone[1], **alone[2]}


def test_missing_part_is_named(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    parts[1].unlink()
    message = r"model-00002-of-00003\.gguf is missing: one of the 3 parts of this model"
    with pytest.raises(CheckpointError, match=message):
        read_gguf(parts[2])


def test_parts_must_be_named_as_they_are_numbered(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    renamed = shutil.copy(parts[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"is one part of 3; its name should end in -00001-o"):
        read_gguf(Path(renamed))
    shutil.copy(parts[1], parts[2])
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf: split\.no is not 2"):
        read_gguf(parts[0])


def test_parts_of_different_models(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    RawGguf().write(parts[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: split\.count is not 3"):
        read_gguf(parts[0])


def split_part(number: int, tensor: str, num_tensors: int) -> RawGguf:
    return RawGguf(
        pairs=[
            pair("split.count", U8, b"\2"),
            pair("split.no", U8, bytes([number])),
            pair("split.tensors.count", U8, bytes([num_tensors])),
        ],
        infos=[info(tensor)],
    )


def test_tensors_of_all_parts_are_counted(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    split_part(0, "a", 2).write(first)
    split_part(1, "b", 2).write(second)
    assert set(read_gguf(first)[0].tensors) == {"a", "b"}
    split_part(1, "a", 2).write(second)
    with pytest.raises(CheckpointError, match="a tensor is in two parts"):
        read_gguf(first)
    split_part(0, "a", 3).write(first)
    split_part(1, "b", 3).write(second)
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count is not 2"):
        read_gguf(first)


@pytest.mark.parametrize(
    "value", [(I8, struct.pack("<b", -1)), (U32, struct.pack("<I", 1025)), (STRING, text("2"))]
)
def test_split_counts_that_are_none(tmp_path: Path, value: tuple[int, bytes]) -> None:
    path = RawGguf(pairs=[pair("split.count", *value)]).write(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"split\.count is "):
        read_gguf(path)


def test_sizes_of_entries_are_exact_however_large(tmp_path: Path) -> None:
    """Sizes beyond 64 bits must not wrap around to something that fits."""
    wrapping = (2**32, 2**32, 4)
    assert math.prod(wrapping) % 2**64 == 0
    with pytest.raises(CheckpointError, match="truncated"):
        read_gguf_header(RawGguf(infos=[info(dims=wrapping)]).write(tmp_path / "bad.gguf"))
