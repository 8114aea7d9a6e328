"""Read what the header of a safetensors file, or of a folder of shards, says is in it.

Headers only: no tensor is read. A header may lie, so each of its numbers is checked against the
size of the file.
Format: huggingface/safetensors, README.md, section Format.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from thinslice.checkpoint.files import (
    file_size,
    os_errors_named,
    parse_json_object,
    read_json_object,
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
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


def read_safetensors_folder(folder: Path) -> dict[str, TensorEntry]:
    """List the tensors of a folder: model.safetensors, or the shards its index names.

    Peak extra memory: the header of one shard, parsed, and the entries.
    Errors: CheckpointError for a missing or damaged shard, and where index and shards disagree.
    """
    if (folder / SINGLE_NAME).is_file():
        return read_safetensors_header(folder / SINGLE_NAME)
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        return _read_shards(folder, _shard_of_each(index_path))
    singles = sorted(folder.glob("*.safetensors"))
    if len(singles) != 1:
        raise CheckpointError(
            f"{folder} holds {len(singles)} safetensors files and no {INDEX_NAME} to say "
            "how they belong together; download the folder again"
        )
    return read_safetensors_header(singles[0])


def read_safetensors_header(path: Path, *, is_packed: bool = False) -> dict[str, TensorEntry]:
    """List the tensors of one file.

    Args:
        is_packed: whether tensors of plain bytes (U8) may be among them, as in a packed checkpoint.

    Peak extra memory: the header and its JSON, at most about ten times 16 MiB.
    Errors: CheckpointError for a damaged file or a tensor of an unsupported type.
    """
    size = file_size(path)
    with os_errors_named(path), path.open("rb") as file:
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
    item_bytes = _ITEM_BYTES | {"U8": 1} if is_packed else _ITEM_BYTES
    entries = [
        _entry((path, data_start), name, fields, item_bytes) for name, fields in header.items()
    ]
    _check_coverage(path, entries, data_start, size)
    return {entry.name: entry for entry in entries}


def _entry(
    place: tuple[Path, int], name: str, fields: Any, item_bytes: Mapping[str, int]
) -> TensorEntry:
    path, data_start = place
    label = f"{path}: tensor {name!r:.120}"
    if not isinstance(fields, dict):
        raise CheckpointError(f"{label} is not described by an object")
    dtype = fields.get("dtype")
    if dtype not in tuple(item_bytes):
        raise CheckpointError(
            f"{label} is {dtype!r:.40}; supported are {', '.join(item_bytes)}, "
            "so take the checkpoint before it was quantised, or a GGUF"
        )
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not _is_counts(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{label} has shape {shape!r:.80}")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{label} has data_offsets {offsets!r:.80}")
    begin, end = offsets
    num_bytes = math.prod(shape) * item_bytes[dtype]
    if end - begin != num_bytes:
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
    for shard in weight_map.values():
        is_plain = isinstance(shard, str) and not any(part in shard for part in "/\\:\0")
        if not is_plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: shard {shard!r:.120} is not the plain name of a safetensors file"
            )
    return weight_map


def _read_shards(folder: Path, shard_of: dict[str, str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(shard_of.values())):
        with os_errors_named(folder / shard):
            if not (folder / shard).exists():
                raise CheckpointError(f"{folder}: shard {shard} is missing; download it again")
        found = read_safetensors_header(folder / shard)
        named = {name for name, its_shard in shard_of.items() if its_shard == shard}
        if named != set(found):
            odd = min(named ^ set(found))
            where = "the index only" if odd in named else "the shard only"
            raise CheckpointError(f"{folder / shard}: tensor {odd!r:.120} is in {where}")
        tensors.update(found)
    return tensors
