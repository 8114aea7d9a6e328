"""The whole path to a device, from LLM to tokens: a twin of it in host memory, kernels interpreted.

What is copied where and when, and what is computed, is the code that a card would run.
"""

import json
import os
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.arrays import array_of
from tests.checkpoints import (
    GgufOptions,
    random_tensors,
    tiny_config,
    write_gguf_model,
    write_safetensors,
    write_safetensors_model,
)
from tests.cuda.twin_device import TwinDevice
from tests.engines import engine_of, greedy, logits_of
from tests.packed_checkpoints import write_packed_model
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine import load
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model
from thinslice.kernels import cuda_ops
from thinslice.kernels.native_pack import quantized
from thinslice.kernels.ops import Ops
from thinslice.kernels.packed import unpack
from thinslice.kernels.torch_ops import TORCH
from thinslice.memory.spilled_kv import BlockMove
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan.card import Card
from thinslice.plan.case import Workload
from thinslice.plan.memory_plan import MemoryPlan, StreamingPlan
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.packing import Packing
from thinslice.plan.planner import plan
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import GIB, MIB

SHORT = [3, 17, 5]
PROMPT = [3, 17, 5, 88, 41, 9, 60, 2, 33, 71, 12]
LONG = [*PROMPT, *PROMPT[::-1]]  # more rows than the kernel of single rows takes
SLICE_BYTES = 4096
SEED = 5


def packed_config(kind: str) -> dict[str, Any]:
    return tiny_config(vocab_size=90, num_hidden_layers=1, tie_word_embeddings="tied" in kind)


def packing_of(kind: str) -> Packing:
    return Packing(PackedFormat(kind.split("-")[1]), PackedFormat.INT8, 64)


def write_numbers(kind: str, folder: Path) -> Checkpoint:
    """The numbers that the matrices of a packed model stand for, as a model in float32."""
    config, packing = packed_config(kind), packing_of(kind)
    tensors = random_tensors(shape_from_config(config), SEED)
    for name, one in tensors.items():
        if name == "model.embed_tokens.weight" and not config["tie_word_embeddings"]:
            tensors[name] = one.bfloat16().float()
        elif one.ndim == 2:
            fmt = packing.weights if name.startswith("model.layers.") else packing.head
            blocks = one.split(packing.ffn_block if "down_proj" in name else one.shape[1], dim=1)
            numbers = [torch.as_tensor(unpack(quantized(array_of(part), fmt))) for part in blocks]
            tensors[name] = torch.cat(numbers, dim=1)
    write_safetensors(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def write(kind: str, folder: Path) -> Checkpoint:
    if kind.startswith("packed"):
        write_packed_model(folder, packed_config(kind), packing_of(kind), SEED)
        return open_checkpoint(folder)
    if kind.startswith("Q"):
        path = folder / "tiny.gguf"
        write_gguf_model(
            path, shape_from_config(tiny_config(num_hidden_layers=1)), SEED, GgufOptions(dtype=kind)
        )
        return open_checkpoint(path)
    config = tiny_config("Qwen2ForCausalLM", tie_word_embeddings="tied" in kind)
    write_safetensors_model(folder, config, SEED)
    return open_checkpoint(folder)


def device_plan(checkpoint: Checkpoint, dtype: str) -> MemoryPlan:
    layout = Model.of(checkpoint).layout(dtype)
    card = Card.of("cuda", GIB, 300 * MIB, GIB, 100 * MIB)
    return plan(checkpoint.shape, layout, Workload(None, 2, dtype), card)


def streamed(chosen: MemoryPlan, checkpoint: Checkpoint, places: tuple[int, int]) -> MemoryPlan:
    """The plan with so many slices on the device and in host memory; the others on disk."""
    num_pinned, num_locked = places
    layout = Model.of(checkpoint).layout(chosen.dtype).without_prediction()
    sweep = layout.sweep_bytes(SLICE_BYTES)
    streaming = StreamingPlan(
        slice_bytes=SLICE_BYTES,
        num_slices=len(sweep.kept),
        num_pinned=num_pinned,
        num_buffers=3,
        buffer_bytes=-(-max(sweep.kept) // 256) * 256,
    )
    host = replace(
        chosen.device, num_locked=num_locked, num_staging=3, staging_bytes=4 * 4096 + 8192
    )
    return replace(chosen, streaming=streaming, device=host)


def engine_on(device: TwinDevice, checkpoint: Checkpoint, chosen: MemoryPlan) -> Engine:
    return load_engine(checkpoint, chosen, frozenset(), None, device)


def num_slices(checkpoint: Checkpoint, dtype: str) -> int:
    return len(Model.of(checkpoint).layout(dtype).slices(SLICE_BYTES))


def assert_near(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    torch.testing.assert_close(torch.from_numpy(found), torch.from_numpy(expected))


def distance(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - expected))


@pytest.mark.parametrize("kind", ["bf16", pytest.param("bf16-tied", marks=pytest.mark.long)])
def test_floats_give_the_processors_logits_and_tokens(kind: str, tmp_path: Path) -> None:
    checkpoint = write(kind, tmp_path)
    expected = engine_of(checkpoint, "float32", max_num_seqs=2)
    engine = engine_on(TwinDevice(), checkpoint, device_plan(checkpoint, "float32"))
    for prompt in (PROMPT, LONG):
        assert_near(logits_of(engine, prompt), logits_of(expected, prompt))
        assert greedy(engine, prompt, 8) == greedy(expected, prompt, 8)


def test_bfloat16_gives_torchs_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = write("bf16", tmp_path)
    engine = engine_on(TwinDevice(), checkpoint, device_plan(checkpoint, "bfloat16"))
    logits = logits_of(engine, PROMPT)
    exact = logits_of(engine_of(checkpoint, "float32"), PROMPT)
    monkeypatch.setattr(cuda_ops, "CUDA", TORCH)
    with_torch = engine_on(TwinDevice(), checkpoint, device_plan(checkpoint, "bfloat16"))
    assert with_torch.runner.weights.ops.product is TORCH.product
    in_torch = logits_of(with_torch, PROMPT)
    # Nothing is nearer to it than the same arithmetic in another order: as far off as torch is.
    assert distance(logits, exact) <= 1.5 * distance(in_torch, exact)


@pytest.mark.parametrize("kind", ["packed-int4", "packed-int8-tied"])
def test_packed_weights_give_the_logits_of_their_numbers(kind: str, tmp_path: Path) -> None:
    checkpoint = write(kind, tmp_path / "packed")
    dtype = {"packed-int8-tied": "int8"}.get(kind, "int4")
    engine = engine_on(TwinDevice(), checkpoint, with_float32_cache(device_plan(checkpoint, dtype)))
    expected = engine_of(write_numbers(kind, tmp_path / "numbers"), "float32")
    assert_near(logits_of(engine, SHORT), logits_of(expected, SHORT))


def with_float32_cache(chosen: MemoryPlan) -> MemoryPlan:
    return replace(chosen, kv_dtype="float32")


@pytest.mark.parametrize(
    "kind",
    [
        "bf16",
        "packed-int4",
        pytest.param("packed-int8-tied", marks=pytest.mark.long),
        pytest.param("Q4_1", marks=pytest.mark.long),
    ],
)
def test_the_bits_are_the_same_wherever_slices_lie(
    kind: str, tmp_path: Path, is_long: bool
) -> None:
    """With the same slices; on the device, in host memory, or on disk."""
    checkpoint = write(kind, tmp_path)
    dtype = {"bf16": "bfloat16", "packed-int8-tied": "int8"}.get(kind, "int4")
    count = num_slices(checkpoint, dtype)
    chosen = device_plan(checkpoint, dtype)
    places = [(count, 0), (0, count), (count // 3, count - count // 3)]
    if kind != "Q4_1":  # blocks of a GGUF are converted, and do not come from disk
        places += [(0, 0), (count // 3, count // 3)]
    results = []
    for place in places if is_long else (places[0], places[-1]):
        device = TwinDevice()
        engine = engine_on(device, checkpoint, streamed(chosen, checkpoint, place))
        results.append((logits_of(engine, LONG), greedy(engine, LONG, 3)))
        engine.runner.close()
        assert device.num_locked == 0
    for logits, tokens in results[1:]:
        assert np.array_equal(logits, results[0][0])
        assert tokens == results[0][1]


def test_a_packed_copy_gives_its_sources_bits(tmp_path: Path) -> None:
    """Among them those of the embedding table, which packing rounds."""
    source = write("Q4_1", tmp_path)
    pack_model(source, tmp_path / "packed", PackOptions(PackedFormat.INT4, "tiny"))
    packed = open_checkpoint(tmp_path / "packed")
    expected, logits = (
        logits_of(engine_on(TwinDevice(), one, device_plan(one, "int4")), LONG)
        for one in (source, packed)
    )
    assert np.array_equal(logits, expected)


def test_blocks_that_are_spilled_come_back_as_they_were(tmp_path: Path) -> None:
    """Of three sequences that do not fit at once, each gets the tokens it gets alone."""
    checkpoint = write("bf16", tmp_path)
    chosen = device_plan(checkpoint, "float32")
    assert chosen.device is not None
    few = replace(
        chosen,
        block_size=4,
        num_kv_blocks=14,
        context=48,
        max_num_seqs=3,
        device=replace(chosen.device, num_spilled_blocks=20),
    )
    device = TwinDevice()
    engine = engine_on(device, checkpoint, few)
    make, blocks = engine.runner.move_blocks, engine.scheduler.blocks
    moved = Counter[bool]()

    in_cache = [rows for one in engine.runner.kv_caches for rows in (one.k, one.v)]
    in_host: list[dict[int, torch.Tensor]] = [{} for _ in in_cache]

    def checked(moves: deque[BlockMove]) -> None:
        expected = [rows.clone() for rows in in_cache]
        for move in moves:
            moved[move.is_spill] += 1
            for rows, kept in zip(expected, in_host, strict=True):
                if move.is_spill:
                    kept[move.host_block] = rows[move.block].clone()
                else:
                    rows[move.block] = kept[move.host_block]
        make(moves)
        for found, rows in zip(in_cache, expected, strict=True):
            assert torch.equal(found.view(torch.int32), rows.view(torch.int32))

    engine.runner.move_blocks = checked  # type: ignore[method-assign]
    prompts = [LONG, LONG[5:], LONG[9:]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    sequences = [engine.add_request(prompt, params) for prompt in prompts]
    most = 0
    while engine.has_work:
        engine.step()
        blocks.check()
        most = max(most, engine.metrics.kv_blocks_spilled)
    assert most > 0
    assert engine.metrics.preemptions > 0
    assert moved[True] > 0
    assert moved[False] > 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        alone = engine_on(TwinDevice(), checkpoint, chosen)
        assert sequence.completion_token_ids == greedy(alone, prompt, 12)
    engine.runner.close()
    assert device.num_locked == 0


def test_a_child_of_a_fork_lets_nothing_of_the_parents_device_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may not use the device, and what it ends with runs the store's finaliser."""
    checkpoint, device = write("packed-int8", tmp_path), TwinDevice()
    chosen = streamed(device_plan(checkpoint, "int8"), checkpoint, (0, 2))
    engine = engine_on(device, checkpoint, chosen)
    before, place = device.num_locked, engine.runner.weights.source.place
    assert before > 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: -1)
        place.close()
    assert device.num_locked == before
    engine.close()
    assert device.num_locked == 0


def test_what_the_host_makes_for_the_operators_goes_to_the_device(tmp_path: Path) -> None:
    """Which the twin, in host memory itself, would not notice."""
    checkpoint, device = write("packed-int8", tmp_path), TwinDevice()
    engine = engine_on(device, checkpoint, device_plan(checkpoint, "int8"))
    assert engine.runner.weights.ops.placed == device.moved
    tables = np.ones(3, np.float32)
    assert device.moved(tables).data_ptr() != tables.ctypes.data


def test_nothing_is_placed_where_the_operators_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> Ops:
        raise ImportError("no Triton")

    monkeypatch.setattr(load, "cuda_ops", missing)
    checkpoint, device = write("packed-int8", tmp_path), TwinDevice()
    with pytest.raises(ImportError, match="no Triton"):
        engine_on(device, checkpoint, device_plan(checkpoint, "int8"))
    assert device.num_locked == 0
