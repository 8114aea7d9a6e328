"""Write a random GGUF of a real model's sizes, every matrix in one quantised type, for llama.cpp.

    python -m tools.make_gguf --shape mimo-7b --type Q4_0 --out mimo-7b-q4_0.gguf

The shapes are those of make_checkpoint, without prediction layers. The file has no tokenizer:
llama-bench needs none. Blocks come from a pool at ever new places of it. Memory: the largest
matrix, 0.7 GB for MiMo-7B in Q8_0.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np

from thinslice.checkpoint.names import expected_tensors
from thinslice.errors import ConfigError, ThinsliceError
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.shape_from_config import shape_from_config
from tools.make_checkpoint import CONFIGS, STD, check_free_space

POOL_BLOCKS = 1 << 20
TYPES = ("Q4_0", "Q8_0")
# llama.cpp knows a MiMo-7B without its prediction layer as a Qwen2.
ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MiMoForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
}


@dataclass(frozen=True)
class Tensor:
    """A tensor as the file has it: matrices quantised, norms and biases in float32."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType

    @property
    def num_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // block * size


def write_gguf(shape_name: str, type_name: str, out: Path) -> None:
    """Write the whole file under another name and give it its own at the end.

    Errors: ConfigError if it exists; StoreError if the disk cannot hold it.
    """
    config = CONFIGS[shape_name]
    shape = shape_from_config({**config, "num_nextn_predict_layers": 0})
    architecture = ARCHITECTURES[config["architectures"][0]]
    tensors = tensors_of(shape, architecture, gguf.GGMLQuantizationType[type_name])
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new file")
    check_free_space(out.parent, sum(tensor.num_bytes for tensor in tensors))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        write_parts(part, shape, architecture, tensors)
        os.replace(part, out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def tensors_of(
    shape: ModelShape, architecture: gguf.MODEL_ARCH, matrix_type: gguf.GGMLQuantizationType
) -> list[Tensor]:
    """Every tensor under its name in a GGUF, with its shape, rows first."""
    names = gguf.get_tensor_name_map(architecture, shape.num_hidden_layers)
    tensors = []
    for name, sizes in expected_tensors(shape).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, f"GGUF has no name for {name}"
        is_matrix = len(sizes) == 2
        type_ = matrix_type if is_matrix else gguf.GGMLQuantizationType.F32
        tensors.append(Tensor(theirs, sizes, type_))
    return tensors


def write_parts(
    path: Path, shape: ModelShape, architecture: gguf.MODEL_ARCH, tensors: list[Tensor]
) -> None:
    """Header, names, then the values of one tensor after the other; synced."""
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_fields(writer, shape)
    for tensor in tensors:
        # Any type but uint8: the shape is then that of the numbers, not of their bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    values = RandomBlocks(tensors)
    for tensor in tensors:
        writer.write_tensor_data(values.of(tensor))
    writer.flush()
    writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def add_fields(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    """The metadata from which llama.cpp learns the model's sizes."""
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")


class RandomBlocks:
    """Bytes of quantised blocks whose numbers lie around zero, of norms around one."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._rng = np.random.default_rng(0)
        quantised = {tensor.type for tensor in tensors} - {gguf.GGMLQuantizationType.F32}
        self._pools = {type_: self._pool(type_) for type_ in quantised}

    def of(self, tensor: Tensor) -> np.ndarray:
        """The tensor's bytes: the pool over and over, from a random place on."""
        if tensor.type is gguf.GGMLQuantizationType.F32:
            mean = 1.0 if "norm" in tensor.name else 0.0
            return self._rng.normal(mean, STD, tensor.shape).astype(np.float32)
        pool = self._pools[tensor.type]
        count = tensor.num_bytes // pool.itemsize
        start = int(self._rng.integers(len(pool)))
        return np.resize(np.roll(pool, start), count)

    def _pool(self, type_: gguf.GGMLQuantizationType) -> np.ndarray:
        block, num_bytes = gguf.GGML_QUANT_SIZES[type_]
        layout = np.dtype([("scale", "<f2"), ("values", "u1", (num_bytes - 2,))])
        pool = np.empty(POOL_BLOCKS, layout)
        largest = 1 << (8 * (num_bytes - 2) // block - 1)
        # Uniform integers of -largest to largest deviate by largest / sqrt(3).
        scale = STD * np.sqrt(3) / largest
        pool["scale"] = self._rng.uniform(0.9, 1.1, POOL_BLOCKS) * scale
        pool["values"] = self._rng.integers(0, 256, pool["values"].shape, dtype=np.uint8)
        return pool


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and write; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=CONFIGS)
    parser.add_argument("--type", default="Q4_0", choices=TYPES, help="of the matrices")
    parser.add_argument("--out", required=True, type=Path, help="the file to make")
    options = parser.parse_args(arguments)
    try:
        write_gguf(options.shape, options.type, options.out)
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
