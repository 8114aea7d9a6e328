"""Engines for tests: loaded from a checkpoint, run greedily or for their logits."""

import torch

from thinslice.checkpoint.index import Checkpoint
from thinslice.config import SamplingParams
from thinslice.engine.engine import Engine
from thinslice.engine.load import load_engine
from thinslice.engine.planning import Model
from thinslice.model.batch import TokenRun, pack
from thinslice.plan.planner import Workload, plan
from thinslice.units import GIB


def engine_of(
    checkpoint: Checkpoint, dtype: str, context: int | None = None, max_num_seqs: int = 1
) -> Engine:
    """A loaded engine with room to spare."""
    workload = Workload(context, max_num_seqs, dtype)
    layout = Model.of(checkpoint).layout(dtype)
    return load_engine(
        checkpoint, plan(checkpoint.shape, layout, 4 * GIB, workload, 0), frozenset()
    )


def greedy(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The ``count`` most likely tokens after a prompt, one after the other."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    sequence = engine.add_request(prompt, params)
    while engine.has_work:
        engine.step()
    return sequence.completion_token_ids


@torch.inference_mode()
def logits_of(engine: Engine, prompt: list[int]) -> torch.Tensor:
    """Logits [T, V] of every position of a prompt, run at once."""
    block_size = engine.plan.block_size
    blocks = range(-(-len(prompt) // block_size))
    batch = pack([TokenRun(prompt, 0, blocks)], block_size)
    runner = engine.runner
    return runner.decoder.logits(runner.decoder(batch, runner.kv_caches))
