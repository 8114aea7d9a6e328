"""Write a random checkpoint of a real model's exact format, for tests and measurements.

    python tools/make_checkpoint.py --shape mimo-7b --out DIR

Names, shapes, types, shards and config.json are those of the published model; only the numbers are
random. They are written from a pool of normal variates at ever new places of it, so the disk sets
the pace. Memory: about 0.3 GiB, nearly all of it torch's own.

Without --tokenizer there is none in the folder: `thinslice plan` and `thinslice show` do without,
`thinslice run`, `chat` and `serve` need one.

With --cycle N the model repeats itself: after token t it prefers t + 1, and after the last of each
N tokens the first of them. A row of the head is that of the embedding before it, and embeddings are
so large beside what the layers add that they decide. It is as much to read and to compute as ever.
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from thinslice.checkpoint.names import expected_tensors
from thinslice.checkpoint.open import open_checkpoint
from thinslice.errors import CheckpointError, ConfigError, StoreError, ThinsliceError
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.text.tokenizer_files import read_tokenizer_files
from thinslice.units import GIB, MIB, format_bytes

SHARD_BYTES = 5 * 10**9  # save_pretrained's default in transformers
POOL_BYTES = 32 * MIB
SYNC_BYTES = 256 * MIB
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
STD = 0.02  # the families' initializer_range
# Embeddings of ten, beside which 36 layers add about as much again.
CYCLE_EMBEDDING_SCALE = 500
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]

# Source: XiaomiMiMo/MiMo-7B-RL, config.json, without auto_map.
MIMO_7B: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "mimo",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 640000,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151680,
}
# Source: Qwen/QwQ-32B, config.json.
QWQ_32B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27648,
    "max_position_embeddings": 40960,
    "max_window_layers": 64,
    "model_type": "qwen2",
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
# Source: HuggingFaceTB/SmolLM2-135M-Instruct, config.json.
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 49152,
}
# About a megabyte each.
TINY: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SMALL: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "vocab_size": 16384,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mimo-7b": MIMO_7B,
    "qwq-32b": QWQ_32B,
    "smollm2-135m": SMOLLM2_135M,
    "tiny-mimo": {**MIMO_7B, **TINY, "head_dim": 32},
    # 0.2 GB: large enough that its prediction layer is seen in the memory of a process.
    "small-mimo": {**MIMO_7B, **SMALL},
    "tiny-qwen2": {**QWQ_32B, **TINY},
    "tiny-llama": {**SMOLLM2_135M, **TINY},
}


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        out: the folder; it must not exist yet.
        tokenizer: a model, as a folder or a GGUF, whose tokenizer goes with the checkpoint.
        cycle: tokens after which greedy text begins anew; 0 for text that is random.
    """

    shape: str
    out: Path
    dtype: str = "bfloat16"
    seed: int = 0
    tokenizer: Path | None = None
    cycle: int = 0
    shard_bytes: int = SHARD_BYTES


def write_checkpoint(job: Job) -> None:
    """Write a whole checkpoint under another name and give it its own at the end.

    Errors: ConfigError if the folder exists or the shape has no such cycle; StoreError if the disk
    cannot hold it.
    """
    config = {**CONFIGS[job.shape], "torch_dtype": job.dtype}
    tensors = expected_tensors(shape_from_config(config))
    if job.cycle:
        check_cycle(job, config)
    num_bytes = sum(prod(shape) for shape in tensors.values()) * itemsize(job.dtype)
    if job.out.exists():
        raise ConfigError(f"{job.out} exists already; name a new folder")
    check_free_space(job.out.parent, num_bytes)
    part = job.out.with_name(f".{job.out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write_json(part / "config.json", config)
        if job.tokenizer is not None:
            write_tokenizer(part, job.tokenizer, config["vocab_size"])
        write_shards(part, job, tensors)
        os.replace(part, job.out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_cycle(job: Job, config: Mapping[str, Any]) -> None:
    """Errors: ConfigError, also for a head that is the embedding itself."""
    if config["tie_word_embeddings"]:
        raise ConfigError(f"{job.shape} has no head of its own, which --cycle needs")
    most = POOL_BYTES // itemsize(job.dtype) // 2 // config["hidden_size"]
    if not 2 <= job.cycle <= most or config["vocab_size"] % job.cycle:
        raise ConfigError(
            f"--cycle {job.cycle}: it must be in 2..{most} and divide {config['vocab_size']} "
            "tokens; 16 would do"
        )


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Errors: StoreError if the disk of the folder, or of where it is going to be, is too full."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes + GIB // 4:  # the file system's own tables, and room to breathe
        raise StoreError(
            f"the checkpoint needs {format_bytes(num_bytes)}; "
            f"{existing} has {format_bytes(free)} free"
        )


def write_shards(folder: Path, job: Job, tensors: Shapes) -> None:
    """One file, or shards of at most ``shard_bytes`` with their index, as transformers has it."""
    shards = split_into_shards(tensors, job)
    names = ["model.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        names = [f"model-{no:05}-of-{count:05}.safetensors" for no in range(1, count + 1)]
    values = RandomValues(job.dtype, job.seed, job.cycle)
    for name, shard in zip(names, shards, strict=True):
        print(f"{name}: {format_bytes(data_bytes(shard, job.dtype))}", file=sys.stderr)
        write_safetensors(folder / name, shard, job.dtype, values)
    if len(shards) > 1:
        weight_map = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        total = data_bytes(tensors, job.dtype)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def split_into_shards(tensors: Shapes, job: Job) -> list[Shapes]:
    """In order, a new shard wherever the next tensor would make one too large."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors.items():
        num_bytes = data_bytes({name: shape}, job.dtype)
        if filled and filled + num_bytes > job.shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += num_bytes
    return list(shards)


def write_safetensors(path: Path, tensors: Shapes, dtype: str, values: "RandomValues") -> None:
    """One file. Format: huggingface/safetensors, README.md."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + prod(shape) * itemsize(dtype)
        fields = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header[name] = fields
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        unsynced = 0
        for name, shape in tensors.items():
            for piece in values.pieces(name, shape):
                file.write(as_bytes(piece))
                unsynced += piece.nbytes
                if unsynced >= SYNC_BYTES:
                    sync(file)
                    unsynced = 0
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Wait for the disk, and keep what was written out of the page cache."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class RandomValues:
    """Normal variates: around zero for weights and biases, around one for norms."""

    def __init__(self, dtype: str, seed: int, cycle: int = 0) -> None:
        self._dtype = getattr(torch, dtype)
        self._cycle = cycle
        self._generator = torch.Generator().manual_seed(seed)
        self._random = random.Random(seed)
        self._pool = self._normal(POOL_BYTES // itemsize(dtype), 0.0)
        self._embedding: list[torch.Tensor] = []

    def pieces(self, name: str, shape: Sequence[int]) -> Iterator[torch.Tensor]:
        """The values of a tensor, flat, at most half the pool at a time."""
        if "norm" in name:
            yield self._normal(prod(shape), 1.0)
        elif self._cycle and name == EMBEDDING:
            self._embedding = [*self._from_pool(prod(shape), self._cycle * shape[1])]
            yield from (piece * CYCLE_EMBEDDING_SCALE for piece in self._embedding)
        elif self._cycle and name == HEAD:
            for piece in self._embedding:
                yield piece.view(-1, self._cycle, shape[1]).roll(1, dims=1).flatten()
        else:
            yield from self._from_pool(prod(shape))

    def _from_pool(self, count: int, multiple: int = 1) -> Iterator[torch.Tensor]:
        """``multiple``: that every piece has numbers of."""
        longest = len(self._pool) // 2 // multiple * multiple
        for begin in range(0, count, longest):
            length = min(longest, count - begin)
            start = self._random.randrange(len(self._pool) - length)
            yield self._pool[start : start + length]

    def _normal(self, count: int, mean: float) -> torch.Tensor:
        return torch.empty(count, dtype=self._dtype).normal_(mean, STD, generator=self._generator)


def as_bytes(values: torch.Tensor) -> memoryview:
    """The tensor's memory, not copied."""
    return values.view(torch.uint8).numpy().data


def itemsize(dtype: str) -> int:
    """Bytes of one value."""
    return int(getattr(torch, dtype).itemsize)


def data_bytes(tensors: Shapes, dtype: str) -> int:
    """Bytes of all values."""
    return sum(prod(shape) for shape in tensors.values()) * itemsize(dtype)


def write_tokenizer(folder: Path, source: Path, vocab_size: int) -> None:
    """Write the tokenizer of another model, of a folder or a GGUF, as a folder has it.

    Errors: CheckpointError if it cannot be read or has more tokens than the checkpoint.
    """
    files = read_tokenizer_files(open_checkpoint(source))
    num_tokens = files.backend.get_vocab_size()
    if num_tokens > vocab_size:
        raise CheckpointError(
            f"{source} has {num_tokens} tokens; this shape has a vocabulary of {vocab_size}"
        )
    files.backend.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": bool(files.special.prompt_prefix_ids),
        "bos_token": files.special.bos_token,
        "chat_template": files.templates.default,
        "eos_token": files.special.eos_token,
    }
    known = {key: value for key, value in config.items() if value is not None}
    write_json(folder / "tokenizer_config.json", known)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented, as transformers writes it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments and write; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=CONFIGS)
    parser.add_argument("--out", required=True, type=Path, help="the folder to make")
    parser.add_argument("--dtype", default=Job.dtype, choices=DTYPES)
    parser.add_argument("--seed", default=Job.seed, type=int)
    parser.add_argument("--tokenizer", type=Path, help="a model (folder or GGUF) to take it from")
    parser.add_argument("--cycle", default=Job.cycle, type=int, help="tokens of text that repeats")
    try:
        write_checkpoint(Job(**vars(parser.parse_args(arguments))))
    except ThinsliceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
