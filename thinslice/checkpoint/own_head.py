"""Whether a model whose embeddings are tied has a head of its own all the same.

Its config may say that the two are tied while the file holds a head with other values, such as a
merged adapter that trained the head. transformers compares the two and uses that head; so do we.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from io import FileIO

from thinslice.checkpoint.files import os_errors_named, read_and_forget
from thinslice.checkpoint.index import TensorEntry
from thinslice.plan.model_shape import ModelShape
from thinslice.units import MIB

_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_PIECE_BYTES = MIB
# Pieces looked at first, over the whole tensor: a head of its own nearly always differs at once.
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


def settle_head(
    shape: ModelShape, tensors: Mapping[str, TensorEntry]
) -> tuple[ModelShape, Mapping[str, TensorEntry]]:
    """The shape and the tensors with the embeddings tied only where they are in the file.

    A table that is missing beside a tied head is that head, which is then given its name.

    Peak extra memory: two pieces of one MiB; equal tensors are read once, to their end.
    Errors: CheckpointError where the file cannot be read.
    """
    head, table = tensors.get(_HEAD), tensors.get(_TABLE)
    if not shape.tie_word_embeddings or head is None:
        return shape, tensors
    if table is None:
        others = {name: entry for name, entry in tensors.items() if name != _HEAD}
        return shape, {**others, _TABLE: replace(head, name=_TABLE)}
    if (head.dtype, head.shape) == (table.dtype, table.shape) and _are_equal(head, table):
        return shape, tensors
    return replace(shape, tie_word_embeddings=False), tensors


def _are_equal(head: TensorEntry, table: TensorEntry) -> bool:
    with ExitStack() as stack:
        files = []
        for entry in (head, table):
            stack.enter_context(os_errors_named(entry.path))
            files.append(stack.enter_context(entry.path.open("rb", buffering=0)))
        return all(
            _piece(head, files[0], start, length) == _piece(table, files[1], start, length)
            for start, length in _pieces(head.num_bytes)
        )


def _piece(entry: TensorEntry, file: FileIO, start: int, length: int) -> bytearray:
    piece = bytearray(length)
    offset = entry.offset + start
    read_and_forget(file.fileno(), memoryview(piece), offset, entry.path)
    return piece


def _pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """First byte and length of each piece to compare: samples, then the whole."""
    for index in range(_NUM_SAMPLES):
        start = index * num_bytes // _NUM_SAMPLES
        yield start, min(_SAMPLE_BYTES, num_bytes - start)
    for start in range(0, num_bytes, _PIECE_BYTES):
        yield start, min(_PIECE_BYTES, num_bytes - start)
