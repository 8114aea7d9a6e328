"""Other numbers in the place of a model's weights, while it stays loaded: what a trainer does
between two rounds of completions."""

from collections.abc import Mapping

import torch

from thinslice.engine.engine import Engine
from thinslice.errors import BusyError, ConfigError
from thinslice.memory.resident import ResidentWeights


def replace_weights(engine: Engine, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace some of the weights; what is cached of the old ones is not found any more.

    Args:
        tensors: by their names in the checkpoint, in any type and on any device; they are copied
            and rounded to what the model computes in.

    Extra memory: a tensor of another type or device once more, one at a time.
    Errors: ConfigError for a model whose weights are packed or streamed, for another name and for
    another shape, with nothing replaced; BusyError while requests are under way.
    """
    weights = engine.runner.weights
    if not isinstance(weights.source, ResidentWeights):
        raise ConfigError(
            "only weights that lie in memory as numbers can be replaced; load the model with dtype "
            "bfloat16 or float32, and with memory for all of it"
        )
    weights.source.check(tensors)
    with engine.lock:
        if engine.has_work:
            raise BusyError("weights are replaced between requests, and some are under way")
        # First: where the copy is interrupted, nothing of before is found either.
        weights.version += 1
        engine.scheduler.blocks.weights_version = weights.version
        weights.source.write(tensors)
