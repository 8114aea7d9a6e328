"""Read what the header of a safetensors file, or of a folder of shards, says is in it.

Headers only: no tensor is read. A header may lie, so each of its numbers is checked against the
size of the file.
Format: huggingface/safetensors, README.md, section Format.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from thinslice.checkpoint.adapters import is_adapter_weights
from thinslice.checkpoint.files import (
    file_size,
    os_errors_named,
    parse_json_object,
    read_json_object,
    refuse_lfs_pointer,
)
from thinslice.checkpoint.index import TensorEntry
from thinslice.errors import CheckpointError
from thinslice.units import MIB

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# The format allows headers of 100 MB. Ours name a thousand tensors in about 0.1 MB; parsed JSON
# takes up to ten times its text, so the limit is what keeps a hostile header out of memory.
_MAX_HEADER_BYTES = 16 * MIB
MAX_TENSORS = 65_536
_MAX_DIMS = 8
_LENGTH_BYTES = 8
USED_DTYPES = ("BF16", "F16", "F32")
# Of types not listed, such as four-bit floats, the header's own offsets tell the size.
_ITEM_BYTES = {
    **{"BF16": 2, "F16": 2, "F32": 4, "F64": 8},
    **{"BOOL": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "U8": 1, "U16": 2, "U32": 4, "U64": 8},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}


@dataclass(frozen=True)
class FolderTensors:
    """The tensors of a folder.

    Attributes:
        absent: for a tensor that the index names and no shard has, what is wrong. Only where it
            is needed does that matter.
    """

    tensors: dict[str, TensorEntry]
    absent: Mapping[str, str]


def read_safetensors_folder(folder: Path) -> FolderTensors:
    """List the tensors of a folder: model.safetensors, or the shards its index names.

    The shards are what counts, as in transformers; the index only says which files they are.

    Peak extra memory: the header of one shard, parsed, and the entries.
    Errors: CheckpointError for a damaged shard, and where nothing tells which files belong
    together.
    """
    if (folder / SINGLE_NAME).is_file():
        return FolderTensors(read_safetensors_header(folder / SINGLE_NAME), {})
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        return _read_shards(folder, _shard_of_each(index_path))
    singles = sorted(
        path for path in folder.glob("*.safetensors") if not is_adapter_weights(path.name)
    )
    if len(singles) != 1:
        raise CheckpointError(
            f"{folder} holds {len(singles)} safetensors files and no {INDEX_NAME} to say "
            "how they belong together; download the folder again"
        )
    return FolderTensors(read_safetensors_header(singles[0]), {})


def check_dtypes(names: Iterable[str], tensors: Mapping[str, TensorEntry]) -> None:
    """Refuse weights of a type that is not read.

    Args:
        names: the tensors that are needed; others may be of any type.

    Errors: CheckpointError naming the first one.
    """
    for name in names:
        entry = tensors.get(name)
        if entry is None or entry.dtype in USED_DTYPES:
            continue
        advice = "take the checkpoint before it was quantised, or a GGUF"
        if entry.dtype == "F64":
            advice = "save the model in one of these (F64 is a float of 64 bits)"
        raise CheckpointError(
            f"{entry.path}: tensor {name!r:.120} is {entry.dtype!r:.40}; supported are "
            f"{', '.join(USED_DTYPES)}, so {advice}"
        )


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """List the tensors of one file, of whatever types.

    Peak extra memory: the header and its JSON, at most about ten times 16 MiB.
    Errors: CheckpointError for a damaged file.
    """
    size = file_size(path)
    with os_errors_named(path), path.open("rb") as file:
        refuse_lfs_pointer(path, file.read(64))
        file.seek(0)
        length_field = file.read(_LENGTH_BYTES)
        header_bytes = int.from_bytes(length_field, "little")
        data_start = _LENGTH_BYTES + header_bytes
        if len(length_field) < _LENGTH_BYTES or data_start > size:
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: "
                f"{size} bytes, header of {header_bytes}"
            )
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: header of {header_bytes} bytes; at most {_MAX_HEADER_BYTES} are expected"
            )
        header = parse_json_object(file.read(header_bytes), str(path))
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors; at most {MAX_TENSORS} are expected")
    entries = [_entry(path, data_start, name, fields) for name, fields in header.items()]
    _check_coverage(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}


def _entry(path: Path, data_start: int, name: str, fields: Any) -> TensorEntry:
    label = f"{path}: tensor {name!r:.120}"
    if not isinstance(fields, dict):
        raise CheckpointError(f"{label} is not described by an object")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{label} has dtype {dtype!r:.40}")
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not _is_counts(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{label} has shape {shape!r:.80}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{label} has data_offsets {offsets!r:.80}")
    begin, end = offsets
    num_bytes = end - begin
    if dtype in _ITEM_BYTES:
        num_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != num_bytes or num_bytes < 0:
        raise CheckpointError(
            f"{label}: data_offsets span {end - begin} bytes, shape and dtype {num_bytes}"
        )
    return TensorEntry(name, path, dtype, tuple(shape), data_start + begin, num_bytes)


def _is_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 63 for one in value)


def _check_coverage(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    """The tensors must fill the file, without holes or overlaps, as the format has it."""
    end = data_start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != end:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r:.120} starts at byte {entry.offset}, "
                f"where {end} was expected"
            )
        end += entry.num_bytes
    if end > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes of {end}; download it again"
        )
    if end < size:
        raise CheckpointError(f"{path} has {size} bytes, but its header tells of only {end}")


def _shard_of_each(index_path: Path) -> dict[str, str]:
    """The index: which shard each tensor is in."""
    weight_map = read_json_object(index_path, _MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no weight_map")
    if len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index_path}: {len(weight_map)} tensors are too many")
    for shard in set(map(str, weight_map.values())):
        parts = PurePosixPath(shard).parts
        is_inside = parts and ".." not in parts and not any(odd in shard for odd in "\\:\0")
        if not is_inside or shard.startswith("/") or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: shard {shard!r:.120} is not the name of a safetensors file in "
                "this folder"
            )
    return {name: str(shard) for name, shard in weight_map.items()}


def _read_shards(folder: Path, shard_of: Mapping[str, str]) -> FolderTensors:
    tensors: dict[str, TensorEntry] = {}
    unclear: dict[str, str] = {}
    missing: set[str] = set()
    for shard in sorted(set(shard_of.values())):
        path = _shard_path(folder, shard)
        if path is None:
            missing.add(shard)
            continue
        for name, entry in read_safetensors_header(path).items():
            if name not in tensors or shard_of.get(name) == shard:
                tensors[name] = entry
            elif name not in shard_of:
                unclear[name] = f"{path}: {name!r:.120} is in two shards, and not in the index"
    absent = {
        name: f"{folder}: shard {shard} is missing; download it again"
        if shard in missing
        else f"{folder / shard}: tensor {name!r:.120} is in the index only"
        for name, shard in shard_of.items()
        if name not in tensors
    }
    found = {name: entry for name, entry in tensors.items() if name not in unclear}
    return FolderTensors(found, absent | unclear)


def _shard_path(folder: Path, shard: str) -> Path | None:
    """The shard's place, or beside the index, where a pull puts every file; None if missing."""
    for path in (folder / shard, folder / PurePosixPath(shard).name):
        with os_errors_named(path):
            if path.exists():
                return path
    return None
