"""Write a random packed checkpoint of a real model's format, without the float one it would be of.

    python -m tools.make_packed --shape qwq-32b --dtype int4 --out DIR

A 32B model takes 64 GB in bfloat16 and 20 GB so. Layout and formats are those of
``thinslice pack``; the numbers repeat after some rows. Memory: about 0.4 GiB, nearly all torch's.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import cycle
from math import prod
from pathlib import Path

import numpy as np

from thinslice.checkpoint.index import Checkpoint, TensorEntry
from thinslice.checkpoint.names import expected_tensors
from thinslice.errors import ConfigError, ThinsliceError
from thinslice.kernels.native_pack import quantized
from thinslice.pack.layout import PackedLayout, Target, Work, layout_of
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing, packing_for
from thinslice.plan.shape_from_config import shape_from_config
from tools.make_checkpoint import (
    CONFIGS,
    STD,
    SYNC_BYTES,
    RandomValues,
    as_bytes,
    check_free_space,
    sync,
    write_json,
    write_tokenizer,
)

# Rows quantised for each kind of matrix; a matrix repeats them.
_ROWS = 1024


def write_packed(shape_name: str, fmt: PackedFormat, out: Path, tokenizer: Path | None) -> None:
    """Write the folder under another name and give it its own at the end.

    Errors: ConfigError if the folder exists; StoreError if the disk cannot hold it.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    config = {**CONFIGS[shape_name], "torch_dtype": "bfloat16"}
    packing = packing_for(shape_from_config(config), fmt)
    source = absent_source(config)
    layout = layout_of(source, packing)
    check_free_space(out.parent, layout.num_bytes)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_json(part / "config.json", {**config, "quantization_config": packing.to_dict()})
        if tokenizer is not None:
            write_tokenizer(part, tokenizer, source.shape.vocab_size)
        write_weights(part / "model.safetensors", layout, packing)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def absent_source(config: dict[str, object]) -> Checkpoint:
    """The bfloat16 checkpoint that would be packed, of which there is no file."""
    shape = shape_from_config(config)
    entries = {
        name: TensorEntry(name, Path(os.devnull), "BF16", size, 0, 2 * prod(size))
        for name, size in expected_tensors(shape).items()
    }
    return Checkpoint(Path(os.devnull), "safetensors", shape, entries, ())


def write_weights(path: Path, layout: PackedLayout, packing: Packing) -> None:
    """Every tensor at its place, random."""
    floats = RandomValues("bfloat16", 0)
    tensors = sorted(
        ((target, work) for work in layout.work for target in work.targets),
        key=lambda one: one[0].offset,
    )
    with path.open("wb") as file:
        file.write(layout.header)
        synced = 0
        for target, work in tensors:
            file.write(bytes(target.offset - file.tell()))
            for piece in _pieces(target, work, floats):
                file.write(piece)
                if file.tell() - synced >= SYNC_BYTES:
                    sync(file)
                    synced = file.tell()
        file.truncate(layout.num_bytes)
        sync(file)


def _pieces(target: Target, work: Work, floats: RandomValues) -> Iterator[memoryview]:
    if work.format is None:
        yield from map(as_bytes, floats.pieces(target.name, (target.num_bytes // 2,)))
        return
    template = _template(work.format, target.columns[1] - target.columns[0])
    left = target.num_bytes
    for piece in cycle([template]):
        yield piece[:left]
        left -= len(piece)
        if left <= 0:
            return


@lru_cache(maxsize=8)
def _template(fmt: PackedFormat, columns: int) -> memoryview:
    numbers = np.random.default_rng(columns).standard_normal((_ROWS, columns), np.float32)
    return memoryview(quantized(numbers * np.float32(STD), fmt).data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and write; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=CONFIGS)
    parser.add_argument("--dtype", default="int4", choices=("int4", "int8"))
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--tokenizer", type=Path, help="a model (folder or GGUF) to take it from")
    options = parser.parse_args(arguments)
    try:
        fmt = PackedFormat(options.dtype)
        write_packed(options.shape, fmt, options.out, options.tokenizer)
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
