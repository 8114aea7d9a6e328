"""Other numbers in the place of a model's weights, while it stays loaded: what a trainer does
between two rounds of completions."""

from collections.abc import Mapping

import torch

from thinslice.engine.runner import Runner
from thinslice.engine.scheduler import Scheduler
from thinslice.errors import BusyError, ConfigError, shown
from thinslice.memory.resident import ResidentWeights
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.tensors import EMBEDDING, HEAD, Room, tensors_of


def replace_weights(
    runner: Runner, scheduler: Scheduler, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Replace some of the weights; what is cached of the old ones is not found any more.

    Extra memory: a tensor of another type or device once more, one at a time.
    Errors: ConfigError with nothing replaced; BusyError while requests are under way. Where it is
    interrupted, the model refuses to run until all has been replaced.
    """
    weights, source = runner.weights, runner.weights.source
    if not isinstance(source, ResidentWeights):
        raise ConfigError(
            "only weights that lie in memory as numbers can be replaced; load the model with dtype "
            "bfloat16 or float32, and with memory for all of it"
        )
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"tensors is {shown(tensors)}; expected a mapping from names to tensors")
    own = loaded_tensors(dict(tensors), weights.shape, source)
    source.check(own)
    if scheduler.has_work:
        raise BusyError("weights are replaced between requests, and some are under way")
    scheduler.blocks.weights_version += 1
    weights.is_whole = False
    source.write(own)
    weights.is_whole = True


def loaded_tensors(
    tensors: dict[str, torch.Tensor], shape: ModelShape, source: ResidentWeights
) -> dict[str, torch.Tensor]:
    """A state dict without what it has twice, or has for layers that are not loaded.

    Errors: ConfigError for a tied head that is another than the embedding.
    """
    if shape.tie_word_embeddings and HEAD in tensors:
        head = tensors.pop(HEAD)
        embedding = tensors.setdefault(EMBEDDING, head)
        if embedding is not head and not torch.equal(embedding, head):
            raise ConfigError(f"{HEAD} is {EMBEDDING} in this model, and they are to differ")
    not_loaded = {one.name for one in tensors_of(shape) if one.room is Room.PREDICTION}
    not_loaded -= source.tensors.keys()
    return {name: one for name, one in tensors.items() if name not in not_loaded}
