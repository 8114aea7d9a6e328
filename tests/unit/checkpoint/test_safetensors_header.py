"""Safetensors headers: what the package itself wrote, and every way a header can lie."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import write_safetensors
from thinslice.checkpoint.safetensors_header import (
    check_dtypes,
    read_safetensors_folder,
    read_safetensors_header,
)
from thinslice.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(5, dtype=torch.bfloat16),
    "c": torch.ones(2, 2, 2, dtype=torch.float16),
    "d": torch.ones(0, 4),
}


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header at all: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


def test_entries_are_those_that_were_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    entries = read_safetensors_header(path)
    assert set(entries) == set(TENSORS)
    content = path.read_bytes()
    for name, expected in TENSORS.items():
        entry = entries[name]
        assert (entry.name, entry.path, entry.shape) == (name, path, tuple(expected.shape))
        assert entry.rotary_heads == 0
        found = content[entry.offset : entry.offset + entry.num_bytes]
        assert found == expected.view(torch.uint8).numpy().tobytes()
    assert [entries[name].dtype for name in "abc"] == ["F32", "BF16", "F16"]


@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tmp_path: Path, shards: int) -> None:
    write_safetensors(tmp_path, TENSORS, shards)
    entries = read_safetensors_folder(tmp_path).tensors
    assert set(entries) == set(TENSORS)
    assert len({entry.path for entry in entries.values()}) == shards


def test_folder_with_one_file_of_another_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert set(read_safetensors_folder(tmp_path).tensors) == set(TENSORS)


def test_folder_of_links_to_blobs_as_the_hub_cache_keeps_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "blobs", TENSORS, shards=2)
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(sorted((tmp_path / "blobs").iterdir())):
        renamed = blob.rename(blob.with_name(f"{number:064x}"))
        (snapshot / blob.name).symlink_to(Path("../../blobs") / renamed.name)
    assert set(read_safetensors_folder(snapshot).tensors) == set(TENSORS)


LIES = [
    (b"not json", b"", "not valid JSON"),
    (b"\xff\xfe", b"", "not valid JSON: 'utf-8' codec can't decode"),
    (b"[]", b"", "JSON holds no object"),
    (b"[" * 100_000, b"", "JSON is nested too deeply"),
    (b'{"a":' * 100_000, b"", "JSON is nested too deeply"),
    (b'{"a": {}, "a": {}}', b"", "key 'a' appears twice"),
    (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "key 'dtype' appears twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", b"", "not valid JSON: Exceeds the limit"),
    ({"a": 1}, b"", "tensor 'a' is not described by an object"),
    ({"a": {}}, b"", "tensor 'a' has dtype None"),
    ({"a": tensor(["F32"])}, b"", r"tensor 'a' has dtype \['F32'\]"),
    ({"a": tensor("I64")}, bytes(8), "span 8 bytes, shape and dtype 16"),
    ({"a": tensor("NEW", data_offsets=[8, 0])}, bytes(8), "data_offsets span -8 bytes"),
    ({"a": tensor(shape=[-2])}, bytes(8), r"has shape \[-2\]"),
    ({"a": tensor(shape=[True, 2])}, bytes(8), r"has shape \[True, 2\]"),
    ({"a": tensor(shape=[2.0])}, bytes(8), r"has shape \[2.0\]"),
    ({"a": tensor(shape=2)}, bytes(8), "has shape 2"),
    ({"a": tensor(shape=[1 << 63])}, bytes(8), "has shape"),
    ({"a": tensor(shape=[1] * 9)}, bytes(8), "has shape"),
    ({"a": tensor(shape=[1 << 62, 1 << 62])}, bytes(8), "span 8 bytes, shape and dtype 8507"),
    ({"a": tensor(data_offsets=[0])}, bytes(8), r"has data_offsets \[0\]"),
    ({"a": tensor(data_offsets=[-8, 0])}, bytes(8), r"has data_offsets \[-8, 0\]"),
    ({"a": tensor(data_offsets="08")}, bytes(8), "has data_offsets '08'"),
    ({"a": tensor(data_offsets=[8, 0])}, bytes(8), "data_offsets span -8 bytes"),
    ({"a": tensor(data_offsets=[0, 4])}, bytes(8), "span 4 bytes, shape and dtype 8"),
    ({"a": tensor(data_offsets=[4, 12])}, bytes(12), "starts at byte 74, where 70 was expected"),
    (
        {"a": tensor(), "b": tensor(data_offsets=[4, 12])},
        bytes(12),
        r"tensor 'b' starts at byte \d+, where \d+ was expected",
    ),
    ({"a": tensor()}, bytes(7), "is truncated: it has 76 bytes of 77; download it again"),
    ({"a": tensor()}, bytes(9), "has 78 bytes, but its header tells of only 77"),
    ({f"t{number}": 0 for number in range(65_537)}, b"", "65537 tensors; at most 65536"),
]


@pytest.mark.parametrize(("header", "data", "message"), LIES, ids=[lie[2] for lie in LIES])
def test_headers_that_lie(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, header of 0"),
        (b"1234567", "7 bytes"),
        (b"\xff" * 8 + b"{}", "is truncated or no safetensors file: 10 bytes, header of 1844"),
        (b"\x05" + bytes(7) + b"{}", "is truncated or no safetensors file"),
    ],
)
def test_header_lengths_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_header(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(18 << 20)
    with pytest.raises(CheckpointError, match="header of 17825792 bytes; at most 16777216"):
        read_safetensors_header(path)


def test_truncated_shard(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(shard))} is truncated"):
        read_safetensors_folder(tmp_path)


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def test_missing_shard_matters_only_for_what_was_in_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    found = read_safetensors_folder(tmp_path)
    assert set(found.tensors) == {"a", "c", "d"}
    assert found.absent == {
        "b": f"{tmp_path}: shard model-00002-of-00003.safetensors is missing; download it again"
    }


def test_the_shards_are_what_counts_and_not_the_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    change_index(tmp_path, e=first, a=second)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"]["b"]
    index_path.write_text(json.dumps(index))
    found = read_safetensors_folder(tmp_path)
    assert set(found.tensors) == set(TENSORS)
    assert found.tensors["a"].path.name == first
    assert found.absent == {"e": f"{tmp_path / first}: tensor 'e' is in the index only"}


def test_a_tensor_in_two_shards_is_the_one_that_the_index_names(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"a": torch.zeros(3), "b": TENSORS["b"], "d": TENSORS["d"]}, second)
    assert read_safetensors_folder(tmp_path).tensors["a"].shape == (2, 3)
    change_index(tmp_path, a=second.name)
    assert read_safetensors_folder(tmp_path).tensors["a"].shape == (3,)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    del index["weight_map"]["a"]
    index_path.write_text(json.dumps(index))
    found = read_safetensors_folder(tmp_path)
    assert set(found.tensors) == {"b", "c", "d"}
    assert found.absent == {"a": f"{second}: 'a' is in two shards, and not in the index"}


@pytest.mark.parametrize("is_pulled", [False, True])
def test_shards_in_a_folder_of_their_own(tmp_path: Path, is_pulled: bool) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"] = {name: f"parts/{its}" for name, its in index["weight_map"].items()}
    index_path.write_text(json.dumps(index))
    if not is_pulled:  # a pull keeps all files side by side
        (tmp_path / "parts").mkdir()
        for shard in tmp_path.glob("*.safetensors"):
            shard.rename(tmp_path / "parts" / shard.name)
    assert set(read_safetensors_folder(tmp_path).tensors) == set(TENSORS)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("I64", "tensor 'a' is 'I64'; supported are BF16, F16, F32, so take the checkpoint before"),
        ("F8_E4M3", "so take the checkpoint before it was quantised, or a GGUF"),
        ("F4", "tensor 'a' is 'F4'; supported"),
        ("F64", r"so save the model in one of these \(F64 is a float of 64 bits\)"),
    ],
)
def test_types_matter_only_where_the_tensor_is_needed(
    tmp_path: Path, dtype: str, message: str
) -> None:
    num_bytes = {"I64": 16, "F8_E4M3": 2, "F4": 1, "F64": 16}[dtype]
    header = {"a": tensor(dtype, data_offsets=[0, num_bytes])}
    entries = read_safetensors_header(
        write_raw(tmp_path / "a.safetensors", header, bytes(num_bytes))
    )
    check_dtypes(["b"], entries)
    with pytest.raises(CheckpointError, match=message):
        check_dtypes(["a"], entries)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/../../model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "model.bin",
        "a\0.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_shard_names_must_stay_in_the_folder(tmp_path: Path, shard: Any) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    change_index(tmp_path, a=shard)
    with pytest.raises(
        CheckpointError, match="is not the name of a safetensors file in this folder"
    ):
        read_safetensors_folder(tmp_path)


def test_shard_names_too_long_for_the_system(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    change_index(tmp_path, a="a" * 1000 + ".safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        read_safetensors_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ("{", "not valid JSON"),
    ],
)
def test_other_indices(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_safetensors_folder(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds 2 safetensors files and no model.safetensor"):
        read_safetensors_folder(tmp_path)


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_safetensors_header(tmp_path / "folder.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_safetensors_header(tmp_path / "none.safetensors")
