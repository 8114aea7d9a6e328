"""Engines for tests: loaded from a checkpoint, run greedily or for their logits."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from tests.arrays import array_of
from tests.checkpoints import random_tensors, tiny_config
from thinslice.checkpoint.index import Checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.engine.load import allocate_kv_caches, load_engine
from thinslice.engine.planning import Model
from thinslice.engine.runner import Runner
from thinslice.kernels.native_ops import NATIVE
from thinslice.memory.resident import ResidentWeights
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.weights import Weights
from thinslice.plan.case import Workload
from thinslice.plan.memory_plan import MemoryPlan, Pool
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.planner import plan
from thinslice.plan.processor import Processor
from thinslice.plan.shape_from_config import shape_from_config
from thinslice.units import GIB


def engine_of(
    checkpoint: Checkpoint, dtype: str, context: int | None = None, max_num_seqs: int = 1
) -> Engine:
    """A loaded engine with room to spare."""
    workload = Workload(context, max_num_seqs, dtype)
    layout = Model.of(checkpoint).layout(dtype)
    return load_engine(
        checkpoint, plan(checkpoint.shape, layout, workload, Processor.of(4 * GIB, 0)), frozenset()
    )


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The ``count`` most likely tokens after a prompt, one after the other."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    sequence = engine.add_request(prompt, params)
    while engine.has_work:
        engine.step()
    return sequence.completion_token_ids


def logits_of(engine: Engine, prompt: list[int]) -> NDArray[np.float32]:
    """Logits [T, V] of every position of a prompt, run at once."""
    block_size = engine.plan.block_size
    blocks = range(-(-len(prompt) // block_size))
    batch = pack([TokenRun(prompt, 0, blocks)], block_size)
    runner = engine.runner
    if runner.device is not None:
        batch = batch.to(runner.device.moved)
    hidden_TD = runner.decoder.forward(batch, runner.weights, runner.kv_caches)
    return runner.decoder.logits(hidden_TD, runner.weights)


def resident_weights(shape: ModelShape, tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Weights from tensors by their names in a checkpoint."""
    source = ResidentWeights({name: array_of(one) for name, one in tensors.items()})
    return Weights(shape, source, NATIVE, None, shape.num_nextn_predict_layers > 0)


def tiny_engine(**sizes: int) -> Engine:
    """A one-layer model with random float32 weights, always the same; ``sizes`` are the plan's."""
    config = tiny_config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    shape = shape_from_config(config)
    chosen = replace(
        MemoryPlan(
            pools=(Pool("--memory", GIB),),
            dtype="float32",
            kv_dtype="float32",
            context=64,
            chunk=32,
            max_num_seqs=4,
            block_size=4,
            num_kv_blocks=64,
        ),
        **sizes,
    )
    weights = resident_weights(shape, random_tensors(shape, seed=2))
    kv_caches = allocate_kv_caches(shape, chosen)
    runner = Runner(Decoder(shape), weights, kv_caches, chosen.block_size)
    return Engine(runner, chosen, frozenset({1}))


def run_all(engine: Engine) -> None:
    """Step until nothing is left; the block manager's invariants hold after each step."""
    while engine.has_work:
        engine.step()
        engine.scheduler.blocks.check()
