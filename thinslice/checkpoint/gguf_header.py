"""Read the metadata and the list of tensors of a GGUF file, or of all parts of a split one.

Headers only: no tensor is read. A header may lie, so each length in it is checked against what is
left of the file before anything of that length is allocated.
Format: ggml-org/ggml, docs/gguf.md, versions 2 and 3, little-endian.
"""

import array
import math
import re
import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from thinslice.checkpoint.files import file_size, os_errors_named, refuse_lfs_pointer
from thinslice.checkpoint.index import TensorEntry
from thinslice.errors import CheckpointError
from thinslice.plan.ggml_types import BY_NUMBER
from thinslice.units import MIB

# A vocabulary of 260,000 tokens with its merges takes about 15 MiB; read into Python objects a
# header grows up to sixfold, so the limit keeps a hostile one out of memory.
_MAX_HEADER_BYTES = 64 * MIB
_MAX_ITEMS = 65_536  # key-value pairs, tensors, or bytes of a name
_MAX_ALIGNMENT = MIB
_MAX_PARTS = 1024
_PART_NAME = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)", re.ASCII)

# Block formats that gguf.quants.dequantize can read from one tensor alone; NVFP4 keeps its outer
# scale in a second one.
_SIMPLE_BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
_K_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_IQ_BLOCKS = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
)
READABLE_TYPES = ("F32", "F16", "BF16", *_SIMPLE_BLOCKS, *_K_BLOCKS, *_IQ_BLOCKS)
_DEFAULT_ALIGNMENT = 32

_BOOL, _STRING, _ARRAY = 7, 8, 9
# Stands for text that could not be decoded.
_NOT_UTF8 = object()
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF says of itself.

    Attributes:
        metadata: key-value pairs. Arrays of numbers are ``array.array``, others lists.
        tensors: entries under their GGUF names, shapes rows first.
    """

    metadata: "GgufMetadata"
    tensors: dict[str, TensorEntry]


class GgufMetadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF. Text that is not UTF-8 is an error where it is asked for.

    A comment in another encoding is thus no reason to refuse the model.

    Attributes:
        is_whole: no key of the file was left out.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], *, is_whole: bool = True) -> None:
        self._path = path
        self._values = values
        self.is_whole = is_whole

    def without(self, keys: Container[str]) -> "GgufMetadata":
        """The pairs without those of some keys."""
        kept = {key: value for key, value in self._values.items() if key not in keys}
        return GgufMetadata(self._path, kept, is_whole=False)

    def __getitem__(self, key: str) -> Any:
        """The value. Errors: CheckpointError if it is text of another encoding."""
        value = self._values[key]
        if value is _NOT_UTF8:
            raise CheckpointError(f"{self._path}: the text of {key!r:.120} is not UTF-8")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def read_gguf(path: Path) -> tuple[GgufHeader, tuple[Path, ...]]:
    """Read a GGUF given by its path, or by that of any part; also its files, first part first.

    Errors: CheckpointError for a damaged file and for a part that is missing or of another model.
    """
    header = read_gguf_header(path)
    num_parts = header.metadata.get("split.count", 1)
    if type(num_parts) is not int or not 0 <= num_parts <= _MAX_PARTS:
        raise CheckpointError(f"{path}: split.count is {num_parts!r:.40}")
    if num_parts <= 1:
        return header, (path,)
    paths = _part_paths(path, num_parts)
    parts = [header if part == path else _read_part(part, num_parts) for part in paths]
    tensors: dict[str, TensorEntry] = {}
    for part_idx, (part, part_path) in enumerate(zip(parts, paths, strict=True)):
        if part.metadata.get("split.no") != part_idx:
            raise CheckpointError(f"{part_path}: split.no is not {part_idx}, as its name says")
        tensors.update(part.tensors)
    num_tensors = sum(len(part.tensors) for part in parts)
    if num_tensors != parts[0].metadata.get("split.tensors.count", num_tensors):
        raise CheckpointError(f"{paths[0]}: split.tensors.count is not {num_tensors}")
    if num_tensors != len(tensors):
        raise CheckpointError(f"{paths[0]}: a tensor is in two parts")
    return replace(parts[0], tensors=tensors), paths


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of one file.

    Peak extra memory: about six times the header, which is at most 64 MiB.
    Errors: CheckpointError for a damaged or big-endian file, another version, or a tensor of a type
    that cannot be read.
    """
    size = file_size(path)
    with os_errors_named(path), path.open("rb") as file:
        refuse_lfs_pointer(path, file.read(64))
        file.seek(0)
        cursor = _Cursor(file, path, size)
        num_tensors, num_pairs = _read_counts(cursor)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = cursor.name()
            if key in metadata:
                raise cursor.error(f"key {key!r:.80} appears twice")
            metadata[key] = _read_value(cursor, cursor.number("I"))
        infos = [_read_tensor_info(cursor) for _ in range(num_tensors)]
        data_start = _aligned(cursor.position, _alignment(path, metadata))
    tensors = {}
    for name, ggml_type, shape, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name!r:.120} appears twice")
        tensors[name] = _entry(path, name, ggml_type, shape, data_start + offset)
        if data_start + offset + tensors[name].num_bytes > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r:.120} ends after its {size} bytes; "
                "download it again"
            )
    return GgufHeader(GgufMetadata(path, metadata), tensors)


def model_name(path: Path) -> str:
    """The file's name, without the part number: the same for all parts of a split GGUF."""
    match = _PART_NAME.fullmatch(path.name)
    return path.name if match is None else f"{match[1]}of-{match[3]}{match[4]}"


class _Cursor:
    """Walks a header from front to back, refusing any length the rest of the file cannot hold."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._limit = min(size, _MAX_HEADER_BYTES)
        self.position = 0

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: at byte {self.position}: {what}")

    def require(self, num_bytes: int) -> None:
        left = self._limit - self.position
        if num_bytes > left:
            raise self.error(f"the header asks for {num_bytes} bytes where {left} are left")

    def take(self, num_bytes: int) -> bytes:
        self.require(num_bytes)
        content = self._file.read(num_bytes)
        if len(content) != num_bytes:
            raise self.error("the file shrank while it was read")
        self.position += num_bytes
        return content

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, max_bytes: int = _MAX_HEADER_BYTES) -> bytes:
        length = self.number("Q")
        if length > max_bytes:
            raise self.error(f"a string of {length} bytes; at most {max_bytes} are expected")
        return self.take(length)

    def name(self) -> str:
        """A key or a tensor's name; bytes that are not UTF-8 are spelled out."""
        return self.text(_MAX_ITEMS).decode(errors="backslashreplace")

    def string(self) -> Any:
        try:
            return self.text().decode()
        except UnicodeDecodeError:
            return _NOT_UTF8

    def strings(self, count: int) -> Any:
        """``count`` strings; a tight loop, for a tokenizer has some 300,000."""
        self.require(8 * count)
        read, from_bytes = self._file.read, int.from_bytes
        position, limit = self.position, self._limit
        strings: list[str] = []
        is_text = True
        for _ in range(count):
            length = from_bytes(read(8), "little")
            position += 8 + length
            if position > limit:
                self.position = position - length
                self.require(length)
            try:
                strings.append(read(length).decode())
            except UnicodeDecodeError:
                is_text = False
        if self._file.tell() != position:
            raise self.error("the file shrank while it was read")
        self.position = position
        return strings if is_text else _NOT_UTF8


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Numbers of tensors and of key-value pairs."""
    if cursor.take(4) != b"GGUF":
        raise cursor.error("no GGUF file: it does not begin with GGUF")
    version = cursor.number("I")
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF; only little-endian ones are supported")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}; versions 2 and 3 are supported")
    num_tensors, num_pairs = cursor.number("Q"), cursor.number("Q")
    if max(num_tensors, num_pairs) > _MAX_ITEMS:
        raise cursor.error(
            f"{num_tensors} tensors and {num_pairs} keys; at most {_MAX_ITEMS} are expected"
        )
    return num_tensors, num_pairs


def _read_value(cursor: _Cursor, value_type: int) -> Any:
    if value_type in _NUMBERS:
        return cursor.number(_NUMBERS[value_type])
    if value_type == _BOOL:
        return _bools(cursor, 1)[0]
    if value_type == _STRING:
        return cursor.string()
    if value_type != _ARRAY:
        raise cursor.error(f"unknown value type {value_type}")
    item_type, count = cursor.number("I"), cursor.number("Q")
    if item_type in _NUMBERS:
        numbers = array.array(_NUMBERS[item_type])
        numbers.frombytes(cursor.take(count * numbers.itemsize))
        return numbers
    if item_type == _BOOL:
        return _bools(cursor, count)
    if item_type == _STRING:
        return cursor.strings(count)
    raise cursor.error(f"unsupported array of type {item_type}")


def _bools(cursor: _Cursor, count: int) -> list[bool]:
    content = cursor.take(count)
    if content.strip(b"\0\1"):
        raise cursor.error("a truth value is neither 0 nor 1")
    return [bool(byte) for byte in content]


def _read_tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, ggml type, shape with rows first, and offset in the data section."""
    name = cursor.name()
    num_dims = cursor.number("I")
    if not 1 <= num_dims <= 4:
        raise cursor.error(f"tensor {name!r:.120} has {num_dims} dimensions; expected 1 to 4")
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    return name, cursor.number("I"), shape, cursor.number("Q")


def _entry(
    path: Path, name: str, ggml_type: int, shape: tuple[int, ...], offset: int
) -> TensorEntry:
    label = f"{path}: tensor {name!r:.120}"
    kind = BY_NUMBER.get(ggml_type)
    dtype = f"type {ggml_type}" if kind is None else kind.name
    if kind is None or dtype not in READABLE_TYPES:
        raise CheckpointError(
            f"{label} is {dtype}, which cannot be read; readable are {', '.join(READABLE_TYPES)}"
        )
    block_size = kind.block_size
    if 0 in shape or shape[-1] % block_size or (block_size > 1 and len(shape) == 1):
        raise CheckpointError(f"{label} of type {dtype} has shape {shape}")
    num_bytes = math.prod(shape) // block_size * kind.block_bytes
    return TensorEntry(name, path, dtype, shape, offset, num_bytes)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_power = type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0
    if not is_power or alignment > _MAX_ALIGNMENT:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r:.40}")
    return int(alignment)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _part_paths(path: Path, num_parts: int) -> tuple[Path, ...]:
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match[3]) != num_parts:
        raise CheckpointError(
            f"{path} is one part of {num_parts}; "
            f"its name should end in -00001-of-{num_parts:05}.gguf or the like"
        )
    names = (f"{match[1]}{no:05}-of-{match[3]}{match[4]}" for no in range(1, num_parts + 1))
    return tuple(path.with_name(name) for name in names)


def _read_part(path: Path, num_parts: int) -> GgufHeader:
    with os_errors_named(path):
        if not path.exists():
            raise CheckpointError(f"{path} is missing: one of the {num_parts} parts of this model")
    header = read_gguf_header(path)
    if header.metadata.get("split.count") != num_parts:
        raise CheckpointError(f"{path}: split.count is not {num_parts}, as its name says")
    return header
