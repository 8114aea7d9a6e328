"""Streamed weights give the tokens of resident ones, from every kind of file, and fail cleanly."""

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import (
    GgufOptions,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
)
from tests.engines import engine_of, greedy, logits_of
from thinslice.checkpoint.index import Checkpoint
from thinslice.checkpoint.open import open_checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model
from thinslice.errors import CheckpointError
from thinslice.kernels.ops import LayerWeights, Rows
from thinslice.memory.slice_reader import SliceReader
from thinslice.memory.slice_schedule import Slice
from thinslice.model.batch import ForwardBatch
from thinslice.model.weights import Weights
from thinslice.pack.pack import PackOptions, pack_model
from thinslice.plan import packing
from thinslice.plan.case import Workload
from thinslice.plan.memory_plan import StreamingPlan
from thinslice.plan.packed_format import PackedFormat
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import GIB

PROMPT = [3, 17, 5, 88, 41, 9, 60, 2, 33, 71, 12]
SLICE_BYTES = 4096
KINDS = {
    "bf16": ("LlamaForCausalLM", {}),
    "bf16-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "bf16-biased": ("Qwen2ForCausalLM", {}),
    "Q4_1": ("LlamaForCausalLM", {}),
    "Q8_0-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "Q4_0": ("Qwen2ForCausalLM", {}),
    "Q5_0": ("Qwen3ForCausalLM", {}),
    "F16": ("Qwen3ForCausalLM", {}),
}


def write(kind: str, folder: Path) -> Checkpoint:
    architecture, changes = KINDS[kind]
    config = tiny_config(architecture, **changes)
    if kind.startswith("bf16"):
        write_safetensors_model(folder, config, seed=5, shards=2)
        return open_checkpoint(folder)
    path = folder / "tiny.gguf"
    write_gguf_model(path, shape_from_config(config), 5, GgufOptions(dtype=kind.split("-")[0]))
    return open_checkpoint(path)


def write_packed(kind: str, folder: Path) -> Checkpoint:
    """Rows that fill no panel and several feed-forward blocks included."""
    dtype, *changes = kind.split("-")
    config = tiny_config("Qwen2ForCausalLM", vocab_size=90, intermediate_size=192)
    config["tie_word_embeddings"] = "tied" in changes
    write_safetensors_model(folder / "source", config, seed=5)
    options = PackOptions(PackedFormat(dtype), "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_BLOCK_WEIGHTS", 64 * 64)
        pack_model(open_checkpoint(folder / "source"), folder / "packed", options)
    return open_checkpoint(folder / "packed")


def streamed_engine(
    checkpoint: Checkpoint, num_pinned: int, dtype: str = "float32", layer_rows: int | None = None
) -> Engine:
    """An engine whose slices are so small that every matrix has several."""
    layout = Model.of(checkpoint).layout(dtype)
    resident = plan(checkpoint.shape, layout, Workload(None, 2, dtype), Processor.of(4 * GIB, 0))
    streaming = StreamingPlan(
        slice_bytes=SLICE_BYTES,
        num_slices=num_slices(checkpoint, dtype),
        num_pinned=num_pinned,
        num_buffers=3,
        buffer_bytes=4 * 4096,
        layer_rows=layer_rows,
    )
    return load_engine(checkpoint, replace(resident, streaming=streaming), frozenset())


def num_slices(checkpoint: Checkpoint, dtype: str = "float32") -> int:
    """Slices of a sweep."""
    return len(Model.of(checkpoint).layout(dtype).slices(SLICE_BYTES))


PACKED = ["packed-int4", "packed-int8-tied"]
# What is kept as it is, packed on the way, and computed with as numbers of either type.
CASES = [
    *(("packed-int4", "int4"), ("packed-int8-tied", "int8")),
    *(("Q4_0", "int4"), ("Q4_1", "int4"), ("Q8_0-tied", "int8"), ("Q5_0", "int8")),
    *((kind, dtype) for kind in KINDS for dtype in ("float32", "bfloat16")),
]
SOME = [("packed-int4", "int4"), ("bf16", "float32"), ("bf16", "bfloat16")]


def written(kind: str, folder: Path) -> Checkpoint:
    if kind in PACKED:
        return write_packed(kind.removeprefix("packed-"), folder)
    return write(kind, folder)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_logits_are_the_same_bits_streamed_or_resident(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    checkpoint = written(kind, tmp_path)
    if checkpoint.packing is not None:
        assert len(checkpoint.packing.blocks(checkpoint.shape.intermediate_size)) == 3
    resident = engine_of(checkpoint, dtype, max_num_seqs=2)
    count = num_slices(checkpoint, dtype)
    expected_logits, expected = logits_of(resident, PROMPT), greedy(resident, PROMPT, 12)
    for num_pinned in (0, count // 3, count - 1, count):
        engine = streamed_engine(checkpoint, num_pinned, dtype)
        assert np.array_equal(logits_of(engine, PROMPT), expected_logits)
        assert greedy(engine, PROMPT, 12) == expected
        engine.runner.close()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*SOME, ("packed-int8-tied", "int8"), ("bf16-biased", "float32"), ("Q8_0-tied", "bfloat16")],
)
def test_scores_from_a_streamed_head_are_those_from_a_resident_one(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    """Beside a completion, which takes its logits from the same pass over the head. The logits are
    the same; only their sum, in float64, is made of other parts."""
    checkpoint = written(kind, tmp_path)
    resident = engine_of(checkpoint, dtype)
    expected, tokens = resident.score(PROMPT, 3, num_top=5), greedy(resident, PROMPT, 12)
    for num_pinned in (0, num_slices(checkpoint, dtype)):
        engine = streamed_engine(checkpoint, num_pinned, dtype)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        completion = engine.add_request(PROMPT, params)
        scored = engine.add_scored(PROMPT, 3, num_top=5)
        while engine.has_work:
            engine.step()
        assert completion.completion_token_ids == tokens
        assert len(scored.logprobs) == len(PROMPT) - 3
        for got, wanted in zip(scored.logprobs, expected, strict=True):
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-12)
            assert [one for one, _ in got.top] == [one for one, _ in wanted.top]
            values = [[value for _, value in one.top] for one in (got, wanted)]
            assert values[0] == pytest.approx(values[1], abs=1e-12)
        engine.close()


def test_a_planted_fault_is_seen(tmp_path: Path) -> None:
    """The comparison fails when the last slice of one matrix is left out."""
    checkpoint = write("bf16", tmp_path)
    expected = logits_of(engine_of(checkpoint, "float32"), PROMPT)
    engine = streamed_engine(checkpoint, num_slices(checkpoint))
    weights = engine.runner.weights
    first, second = weights.layers
    (block,) = second.blocks
    down = replace(block.down, slices=lambda: [*block.down.slices()][:-1], whole=None)
    weights.layers = (first, replace(second, blocks=(replace(block, down=down),)))
    assert not np.array_equal(logits_of(engine, PROMPT), expected)


@pytest.mark.parametrize(("kind", "dtype"), SOME)
def test_chunks_and_a_sweep_broken_off_leave_the_order_right(
    kind: str, dtype: str, tmp_path: Path
) -> None:
    checkpoint = written(kind, tmp_path)
    expected = greedy(engine_of(checkpoint, dtype), PROMPT, 6)
    engine = streamed_engine(checkpoint, 4, dtype)
    engine.scheduler.chunk = 4  # two sweeps end before the head
    assert greedy(engine, PROMPT, 6) == expected
    weights = engine.runner.weights
    original = interrupt_at_the_last_layer(weights)
    sequence = engine.add_request(PROMPT, SamplingParams(max_tokens=2))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.abort(sequence)
    weights.layers = original
    assert greedy(engine, PROMPT, 6) == expected
    engine.runner.close()


def interrupt_at_the_last_layer(weights: Weights) -> tuple[LayerWeights, ...]:
    """Ctrl-C before the last layer's feed-forward; returns the layers as they were."""
    *others, last = original = weights.layers
    (block, *more) = last.blocks
    broken = replace(block, gate=replace(block.gate, slices=interrupt, whole=None))
    weights.layers = (*others, replace(last, blocks=(broken, *more)))
    return original


def interrupt() -> Iterator[tuple[int, int, Rows]]:
    raise KeyboardInterrupt


@contextmanager
def slices_taken(engine: Engine) -> Iterator[list[int]]:
    """Collects the bytes of each slice that is taken from the reader."""
    reader = engine.runner.weights.source.place.reader
    taken: list[int] = []

    @contextmanager
    def next_slice(expected: Slice) -> Iterator[NDArray[np.uint8]]:
        with SliceReader.next(reader, expected) as raw:
            taken.append(len(raw))
            yield raw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "next", next_slice)
        yield taken


def streamed_bytes(engine: Engine, dtype: str) -> list[int]:
    """Bytes of each slice that one sweep streams, in order."""
    checkpoint = engine.runner.weights.source._reader.checkpoint
    slices = Model.of(checkpoint).layout(dtype).slices(SLICE_BYTES)
    pinned = engine.plan.streaming.pinned()
    return [one.stored_bytes for index, one in enumerate(slices) if index not in pinned]


LONG_PROMPT = [(7 * i * i + 3 * i) % 90 for i in range(61)]


@pytest.mark.parametrize("layer_rows", [4, 16, 60])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *SOME,
        *(("packed-int8-tied", "int8"), ("Q4_1", "int4"), ("Q5_0", "int8")),
        *(("F16", "float32"), ("F16", "bfloat16")),
    ],
)
def test_a_prompt_of_many_rows_reads_each_weight_once(
    kind: str, dtype: str, layer_rows: int, tmp_path: Path
) -> None:
    """With the very bits of a resident model."""
    checkpoint = written(kind, tmp_path)
    resident = engine_of(checkpoint, dtype)
    expected_logits = logits_of(resident, LONG_PROMPT)
    expected = greedy(resident, LONG_PROMPT, 6)
    for num_pinned in (0, num_slices(checkpoint, dtype) // 3):
        engine = streamed_engine(checkpoint, num_pinned, dtype, layer_rows)
        assert np.array_equal(logits_of(engine, LONG_PROMPT), expected_logits)
        sequence = engine.add_request(LONG_PROMPT, SamplingParams(temperature=0, max_tokens=6))
        with slices_taken(engine) as taken:
            engine.step()
        assert sequence.num_computed == len(LONG_PROMPT)
        assert taken == streamed_bytes(engine, dtype)
        while engine.has_work:
            engine.step()
        assert sequence.completion_token_ids == expected
        engine.runner.close()


@pytest.mark.parametrize(("kind", "dtype"), SOME)
def test_faults_of_a_held_layer_are_seen(
    kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that attend to what is not written yet; and slices not held, for which the next come."""
    checkpoint = written(kind, tmp_path)
    engine = streamed_engine(checkpoint, 0, dtype, layer_rows=16)
    expected = logits_of(engine_of(checkpoint, dtype), LONG_PROMPT)
    whole, original = np.array([len(LONG_PROMPT)], np.int32), ForwardBatch._part

    def seeing_all(*args: Any) -> ForwardBatch:
        part = original(*args)
        return replace(part, sequences=replace(part.sequences, context_lens=whole))

    monkeypatch.setattr(ForwardBatch, "_part", seeing_all)
    assert not np.array_equal(logits_of(engine, LONG_PROMPT), expected)
    monkeypatch.undo()
    assert np.array_equal(logits_of(engine, LONG_PROMPT), expected)
    engine.runner.weights.source.hold = nullcontext
    with pytest.raises(AssertionError, match="the next slice is"):
        logits_of(engine, LONG_PROMPT)
    engine.runner.close()


def test_two_slices_of_one_shape_that_are_swapped_are_found(tmp_path: Path) -> None:
    engine = streamed_engine(write("bf16", tmp_path), 0)
    placed = engine.runner.weights.source._slices
    key, value = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "kv")
    assert [one.stored_bytes for one, _ in placed[key]] == [
        one.stored_bytes for one, _ in placed[value]
    ]
    placed[key][:], placed[value][:] = placed[value][:], placed[key][:]
    with pytest.raises(AssertionError, match="the next slice is"):
        logits_of(engine, PROMPT)
    engine.runner.close()


def test_a_streamed_model_that_nobody_holds_is_let_go(tmp_path: Path) -> None:
    """Its reading threads and files too; those that it had are counted by their names."""
    checkpoint = write("bf16", tmp_path)
    gc.collect()
    threads, files = reading_threads(), open_files(tmp_path)
    engine = streamed_engine(checkpoint, 4)
    greedy(engine, PROMPT, 2)
    assert reading_threads() > threads
    assert open_files(tmp_path) > files
    del engine
    gc.collect()
    assert reading_threads() == threads
    assert open_files(tmp_path) == files


def reading_threads() -> int:
    return sum(thread.name.startswith("thinslice-read") for thread in threading.enumerate())


def open_files(folder: Path) -> int:
    """How many descriptors of this process are files in a folder."""
    links = (os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    return sum(link.startswith(str(folder)) for link in links)


@pytest.mark.parametrize(("kind", "dtype"), SOME)
def test_rows_of_several_sequences_pass_a_held_layer(kind: str, dtype: str, tmp_path: Path) -> None:
    """Decoding rows and prompts in one step, a sequence cut between two runs of rows; and a sweep
    broken off within a held layer leaves nothing behind."""
    checkpoint = written(kind, tmp_path)
    prompts = [LONG_PROMPT[:5], LONG_PROMPT[:37], LONG_PROMPT[3:30]]
    alone = engine_of(checkpoint, dtype, max_num_seqs=3)
    expected = [greedy(alone, prompt, 5) for prompt in prompts]
    engine = streamed_engine(checkpoint, 20, dtype, layer_rows=8)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    for _ in range(2):
        sequences = [engine.add_request(prompts[0], params)]
        engine.step()
        sequences += [engine.add_request(prompt, params) for prompt in prompts[1:]]
        original = interrupt_at_the_last_layer(engine.runner.weights)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.runner.weights.layers = original
        while engine.has_work:
            engine.step()
        assert [one.completion_token_ids for one in sequences] == expected
    engine.runner.close()


def test_a_file_that_shrinks_under_a_running_model_is_named(tmp_path: Path) -> None:
    checkpoint = write("bf16", tmp_path)
    engine = streamed_engine(checkpoint, 0)
    greedy(engine, PROMPT, 2)
    victim = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"].path
    os.truncate(victim, 4096)
    with pytest.raises(CheckpointError, match=victim.name):
        greedy(engine, PROMPT, 4)
    engine.runner.close()
