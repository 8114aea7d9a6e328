"""Write the versions of the embedded model that thinslice's own formats are measured against.

    python -m tools.make_references --out DIR

DIR/bf16 is SmolLM2 as a folder of safetensors, its numbers those of the embedded GGUF rounded to
bfloat16. The others are made of those bfloat16 numbers, as llama.cpp's quantiser would make them:

    q4_0.gguf        Q4_0, the embedding table (which is the head too) Q8_0
    q4_0-pure.gguf   Q4_0 throughout, as with --pure
    q8_0.gguf        Q8_0 throughout

Where a table serves as head llama.cpp takes Q6_K for it, and Q8_0 where rows are no multiple of
256, as they are not here. Vectors stay float32. The quantiser is that of the gguf package, the same
bit for bit as llama.cpp's reference without an importance matrix. Memory: about 1.5 GiB.

    thinslice compare DIR/bf16 DIR/q4_0.gguf --text FILE
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import save_file

from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.errors import ConfigError, ThinsliceError
from thinslice.kernels.arrays import BF16
from thinslice.kernels.torch_ops import tensor_of
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.store.store import Store
from thinslice.units import MIB
from tools.make_checkpoint import SMOLLM2_135M, check_free_space, write_json, write_tokenizer

MODEL = "smollm2"
DISK_BYTES = 640 * MIB
TABLE = "token_embd.weight"
# llama_ftype in llama.cpp's include/llama.h.
FILE_TYPES = {Kind.Q4_0: 2, Kind.Q8_0: 7}
# File, type of the matrices, type of the table.
VERSIONS = (
    ("q4_0.gguf", Kind.Q4_0, Kind.Q8_0),
    ("q4_0-pure.gguf", Kind.Q4_0, Kind.Q4_0),
    ("q8_0.gguf", Kind.Q8_0, Kind.Q8_0),
)
# The writer puts these into each file itself.
WRITTEN_ALREADY = ("general.architecture", "general.file_type", "general.quantization_version")


def write_references(source: Path, config: Mapping[str, Any], out: Path) -> None:
    """Write all versions of a GGUF under another name and give the folder its own at the end.

    Args:
        config: the config.json that belongs to the model.

    Errors: ConfigError if the folder exists; StoreError if the disk cannot hold it.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    check_free_space(out.parent, DISK_BYTES)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_folder(source, config, part / "bf16")
        for name, matrices, table in VERSIONS:
            write_gguf(source, part / name, matrices, table)
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_folder(source: Path, config: Mapping[str, Any], folder: Path) -> None:
    """The model in bfloat16 as Hugging Face has it, tokenizer and template included."""
    folder.mkdir()
    config = {**config, "torch_dtype": "bfloat16"}
    shape = shape_from_config(config)
    tensors = {}
    with CheckpointReader(open_checkpoint(source)) as reader:
        for name, size in expected_tensors(shape).items():
            numbers = np.empty(size, BF16)
            reader.read(name, numbers)
            tensors[name] = tensor_of(numbers)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_tokenizer(folder, source, shape.vocab_size)


def write_gguf(source: Path, path: Path, matrices: Kind, table: Kind) -> None:
    """The model quantised, from the numbers of ``source`` rounded to bfloat16.

    Rows stay in the order that GGUF has them in, which no rounding and no quantiser sees.
    """
    print(path.name, file=sys.stderr)
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(FILE_TYPES[matrices])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for tensor in reader.tensors:
        values = as_bfloat16(gguf.dequantize(tensor.data, tensor.tensor_type))
        kind = table if tensor.name == TABLE else matrices
        if values.ndim == 1:
            kind = Kind.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    """What the source says of itself, its tokenizer included."""
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in WRITTEN_ALREADY:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=item)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, in float32."""
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and write; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    out: Path = parser.parse_args(arguments).out
    try:
        write_references(Store().ensure(MODEL), SMOLLM2_135M, out)
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
