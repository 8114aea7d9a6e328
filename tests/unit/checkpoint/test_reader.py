"""Reading tensors: every type and row range, row order, few and bounded reads, failing files."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from tests.arrays import array_of, tensor_of
from tests.checkpoints import GgufOptions, tiny_config, write_gguf_model, write_safetensors_model
from thinslice.checkpoint import reader as reader_module
from thinslice.checkpoint.gguf_header import READABLE_TYPES, read_gguf_header
from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import SCRATCH_BYTES, CheckpointReader
from thinslice.checkpoint.safetensors_header import read_safetensors_header
from thinslice.errors import CheckpointError
from thinslice.plan.shape_from_config import shape_from_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = shape_from_config(tiny_config())
Array = NDArray[np.generic]


def room(*size: int, dtype: torch.dtype = torch.float32) -> Array:
    """An array to be filled, in which every number that is not set is seen."""
    return array_of(torch.full(size, math.nan, dtype=dtype))


def reader_of(path: Path, tensors: dict[str, TensorEntry]) -> CheckpointReader:
    """A reader of tensors that need not be a model's."""
    return CheckpointReader(Checkpoint(path, "test", SHAPE, tensors, (path,)))


def write_types(path: Path, num_rows: int = 37, num_columns: int = 512) -> dict[str, torch.Tensor]:
    """A GGUF with a random matrix of every readable type, named by it; their values.

    Blocks of a type that gguf cannot make are random bytes, which are as good a block as any.
    """
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "llama")
    expected = {}
    for name in READABLE_TYPES:
        ggml_type = gguf.GGMLQuantizationType[name]
        try:
            content = gguf.quantize(
                rng.standard_normal((num_rows, num_columns), dtype=np.float32), ggml_type
            )
        except NotImplementedError:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
            row_bytes = num_columns // block_size * block_bytes
            content = rng.integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)
        writer.add_tensor(name, content, raw_dtype=ggml_type)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(content, ggml_type)
        expected[name] = torch.from_numpy(values.reshape(num_rows, num_columns).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def assert_same(found: Array, expected: torch.Tensor) -> None:
    """Equal bit for bit, where a NaN equals a NaN."""
    torch.testing.assert_close(tensor_of(found), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, 5000, 1])
def test_every_type_whole_and_in_row_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch_bytes: int
) -> None:
    monkeypatch.setattr(reader_module, "SCRATCH_BYTES", scratch_bytes)
    path = tmp_path / "types.gguf"
    expected = write_types(path)
    with reader_of(path, read_gguf_header(path).tensors) as reader:
        for name, whole in expected.items():
            for dtype in DTYPES:
                out = room(*whole.shape, dtype=dtype)
                with np.errstate(over="ignore"):
                    reader.read(name, out)
                assert_same(out, whole.to(dtype))
            for start, stop in ((0, 1), (36, 37), (5, 30), (16, 16)):
                out = room(stop - start, whole.shape[1])
                reader.read_rows(name, start, stop, out)
                assert_same(out, whole[start:stop])


@pytest.mark.parametrize("saved_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_safetensors_of_any_rank(
    tmp_path: Path, saved_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "vector": torch.randn(301).to(saved_dtype),
        "matrix": torch.randn(11, 7).to(saved_dtype),
        "cube": torch.randn(5, 3, 4).to(saved_dtype),
        "empty": torch.randn(4, 0).to(saved_dtype),
    }
    save_file(tensors, path)
    with reader_of(path, read_safetensors_header(path)) as reader:
        for name, expected in tensors.items():
            out = room(*expected.shape, dtype=out_dtype)
            reader.read(name, out)
            assert torch.equal(tensor_of(out), expected.to(out_dtype))
            rows = room(2, *expected.shape[1:], dtype=out_dtype)
            reader.read_rows(name, 1, 3, rows)
            assert torch.equal(tensor_of(rows), expected[1:3].to(out_dtype))


@pytest.fixture(scope="module")
def reordered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheckpointReader]:
    """Tensors named by type, each kept in llama.cpp's row order with three heads of 16 rows."""
    path = tmp_path_factory.mktemp("reordered") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rng = np.random.default_rng(3)
    for name in ("F32", "F16", "BF16", "Q8_0", "Q4_1"):
        ggml_type = gguf.GGMLQuantizationType[name]
        values = rng.standard_normal((48, 64), dtype=np.float32)
        writer.add_tensor(name, gguf.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.add_tensor("bias", rng.standard_normal(48, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entries = {
        name: TensorEntry(
            name, path, entry.dtype, entry.shape, entry.offset, entry.num_bytes, rotary_heads=3
        )
        for name, entry in read_gguf_header(path).tensors.items()
    }
    with reader_of(path, entries) as reader:
        yield reader


def as_transformers_reorders(reader: CheckpointReader, name: str) -> torch.Tensor:
    """The tensor as the file has it, its rows put back by transformers' own formula."""
    entry = reader.checkpoint.tensors[name]
    kept = TensorEntry(name, entry.path, entry.dtype, entry.shape, entry.offset, entry.num_bytes)
    out = room(*entry.shape)
    with reader_of(entry.path, {name: kept}) as plain:
        plain.read(name, out)
    rows = LlamaTensorProcessor()._reverse_permute_weights(out, 3, 3)
    return torch.from_numpy(np.ascontiguousarray(rows))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "bias"])
@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, 700])
def test_reordered_rows_go_back_as_in_transformers(
    reordered: CheckpointReader, name: str, scratch_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "SCRATCH_BYTES", scratch_bytes)
    expected = as_transformers_reorders(reordered, name)
    for dtype in DTYPES:
        out = room(*expected.shape, dtype=dtype)
        reordered.read(name, out)
        assert torch.equal(tensor_of(out), expected.to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["F32", "BF16", "Q4_1", "bias"]),
    bounds=st.tuples(st.integers(0, 48), st.integers(0, 48)),
)
def test_any_range_of_reordered_rows(
    reordered: CheckpointReader, name: str, bounds: tuple[int, int]
) -> None:
    start, stop = sorted(bounds)
    expected = as_transformers_reorders(reordered, name)[start:stop]
    out = room(*expected.shape)
    reordered.read_rows(name, start, stop, out)
    assert torch.equal(tensor_of(out), expected)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_model_round_trips_through_gguf(tmp_path: Path, dtype: str, architecture: str) -> None:
    shape = shape_from_config(tiny_config(architecture))
    path = tmp_path / "model.gguf"
    expected = write_gguf_model(path, shape, options=GgufOptions(dtype))
    checkpoint = open_checkpoint(path)
    with CheckpointReader(checkpoint) as reader:
        for name, tensor in expected.items():
            out = room(*tensor.shape)
            reader.read(name, out)
            assert torch.equal(tensor_of(out), tensor), name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and size of every read from here on, of files of which nothing is in a cache."""
    recorded: list[tuple[int, int]] = []
    preadv = os.preadv

    def recording(file: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            raise BlockingIOError
        recorded.append((offset, sum(len(view) for view in views)))
        return preadv(file, views, offset)

    monkeypatch.setattr(os, "preadv", recording)
    return recorded


def test_a_row_costs_one_read_of_its_bytes(
    tmp_path: Path, reordered: CheckpointReader, reads: list[tuple[int, int]]
) -> None:
    path = tmp_path / "types.gguf"
    write_types(path)
    with reader_of(path, read_gguf_header(path).tensors) as reader:
        for name, entry in reader.checkpoint.tensors.items():
            row_bytes = entry.num_bytes // 37
            reader.read_rows(name, 9, 10, room(1, 512))
            assert reads == [(entry.offset + 9 * row_bytes, row_bytes)], name
            reads.clear()
    entry = reordered.checkpoint.tensors["Q8_0"]
    reordered.read_rows("Q8_0", 17, 18, room(1, 64))
    assert reads == [(entry.offset + 18 * entry.num_bytes // 48, entry.num_bytes // 48)]


@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_0", "Q6_K"])
def test_reads_are_bounded_and_cover_a_tensor_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[int, int]], name: str
) -> None:
    monkeypatch.setattr(reader_module, "SCRATCH_BYTES", 10_000)
    path = tmp_path / "types.gguf"
    whole = write_types(path)[name]
    with reader_of(path, read_gguf_header(path).tensors) as reader:
        entry = reader.checkpoint.tensors[name]
        reader.read(name, room(*whole.shape))
    end = entry.offset
    for offset, num_bytes in reads:
        assert offset == end
        assert num_bytes <= 10_000
        end += num_bytes
    assert end == entry.offset + entry.num_bytes
    assert len(reads) > 3


@pytest.mark.parametrize("name", ["BF16", "Q4_0", "Q6_K", "reordered"])
def test_converted_pieces_fit_the_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(reader_module, "SCRATCH_BYTES", 10_000)
    sizes = []
    values_of = reader_module._values

    def recording(entry: TensorEntry, raw: NDArray[np.uint8]) -> Array:
        values = values_of(entry, raw)
        sizes.append((raw.nbytes, values.nbytes))
        return values

    monkeypatch.setattr(reader_module, "_values", recording)
    path = tmp_path / "types.gguf"
    write_types(path, num_rows=48)
    entries = read_gguf_header(path).tensors
    kept = entries["Q8_0"]
    entries["reordered"] = TensorEntry(
        "reordered", path, kept.dtype, kept.shape, kept.offset, kept.num_bytes, rotary_heads=2
    )
    with reader_of(path, entries) as reader:
        reader.read(name, room(48, 512))
    assert len(sizes) > 4
    assert max(max(pair) for pair in sizes) <= 10_000


def test_a_straight_read_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors_model(tmp_path, tiny_config(), dtype=torch.bfloat16)
    with CheckpointReader(open_checkpoint(tmp_path)) as reader:
        name = "model.embed_tokens.weight"
        out = room(*reader.checkpoint.tensors[name].shape, dtype=torch.bfloat16)
        for module, copying in ((np, "empty"), (reader_module, "empty_bytes")):
            monkeypatch.setattr(module, copying, None)
        monkeypatch.setattr(reader_module, "copy_into", None)
        reader.read(name, out)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_read_bytes_are_dropped_from_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[int, int]]
) -> None:
    dropped = []

    def recording(file: int, offset: int, num_bytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((offset, num_bytes))

    monkeypatch.setattr(os, "posix_fadvise", recording)
    write_safetensors_model(tmp_path, tiny_config())
    with CheckpointReader(open_checkpoint(tmp_path)) as reader:
        reader.read("model.embed_tokens.weight", room(96, 64))
    assert dropped == reads


@pytest.mark.parametrize("num_cached", [0, 5000, 96 * 64 * 2])
def test_what_the_cache_holds_is_read_from_there_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cached: int
) -> None:
    tensors = write_safetensors_model(tmp_path, tiny_config())
    checkpoint = open_checkpoint(tmp_path)
    entry = checkpoint.tensors["model.embed_tokens.weight"]
    preadv, read, dropped = os.preadv, list[tuple[int, int]](), list[tuple[int, int]]()

    def cached(file: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags == os.RWF_NOWAIT:
            return preadv(file, [views[0][:num_cached]], offset)
        read.append((offset, len(views[0])))
        return preadv(file, views, offset)

    monkeypatch.setattr(os, "preadv", cached)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, at, count, _: dropped.append((at, count)))
    out = room(96, 64)
    with CheckpointReader(checkpoint) as reader:
        reader.read(entry.name, out)
    assert np.array_equal(out, tensors[entry.name].float().numpy())
    rest = entry.num_bytes - num_cached
    assert read == dropped == ([(entry.offset + num_cached, rest)] if rest else [])


def test_a_file_that_shrinks_while_in_use(tmp_path: Path) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    checkpoint = open_checkpoint(tmp_path)
    last = max(checkpoint.tensors.values(), key=lambda entry: entry.offset)
    with CheckpointReader(checkpoint) as reader:
        out = room(*last.shape)
        reader.read(last.name, out)
        os.truncate(last.path, last.offset + last.num_bytes - 1)
        end = last.offset + last.num_bytes - 1
        with pytest.raises(CheckpointError, match=f"ends at byte {end}: it changed while in use"):
            reader.read(last.name, out)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    checkpoint = open_checkpoint(tmp_path)
    path, out = tmp_path / "model.safetensors", room(64)

    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with CheckpointReader(checkpoint) as reader:
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            with pytest.raises(CheckpointError) as caught:
                reader.read("model.norm.weight", out)
        assert str(caught.value) == f"{path} cannot be read: Input/output error"
        reader.close()
        path.unlink()
        with pytest.raises(CheckpointError, match="cannot be read: No such file"):
            reader.read("model.norm.weight", out)


def test_close_closes_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    os_open = os.open

    def recording(path: Path, flags: int) -> int:
        opened.append(os_open(path, flags))
        return opened[-1]

    monkeypatch.setattr(os, "open", recording)
    write_safetensors_model(tmp_path, tiny_config(), shards=2)
    checkpoint = open_checkpoint(tmp_path)
    with CheckpointReader(checkpoint) as reader:
        for _ in range(2):
            for name, entry in checkpoint.tensors.items():
                reader.read(name, room(*entry.shape))
        assert len(opened) == 2
    for file in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(file)


def test_threads_read_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    expected = write_gguf_model(path, SHAPE, options=GgufOptions("Q8_0", max_tensors=4))
    with CheckpointReader(open_checkpoint(tmp_path)) as reader, ThreadPoolExecutor(8) as pool:

        def read(name: str) -> Array:
            out = room(*expected[name].shape)
            reader.read(name, out)
            return out

        names = list(expected) * 4
        for name, found in zip(names, pool.map(read, names), strict=True):
            assert torch.equal(tensor_of(found), expected[name]), name


@pytest.mark.parametrize(
    ("start", "stop", "out"),
    [
        (0, 65, room(65)),
        (-1, 0, room(1)),
        (2, 1, room(1)),
        (0, 2, room(3)),
        (0, 2, room(2, 1)),
        (0, 2, room(4)[::2]),
        (0, 2, room(2, dtype=torch.float64)),
        (0, 2, np.zeros(2, np.int16)),
    ],
)
def test_buffers_that_do_not_fit_are_a_bug_of_the_caller(
    tmp_path: Path, start: int, stop: int, out: Array
) -> None:
    write_safetensors_model(tmp_path, tiny_config())
    reader = CheckpointReader(open_checkpoint(tmp_path))
    with reader, pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        reader.read_rows("model.norm.weight", start, stop, out)
