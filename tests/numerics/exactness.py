"""Logits beside those of transformers: as near to its own in float64 as its own in float32 are."""

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tests.arrays import tensor_of

# Two float32 results differ by the errors of both, so neither is what the other is measured by. The
# roundings of a trained model go the same way in many logits of a text at once: by how much, chance
# decides for either, so errors are compared over all texts, and those of each only roughly.
MOST_OF_THEIR_RMS, MOST_OF_THEIR_LARGEST = 1.25, 3.0


class Reference:
    """A model of transformers in float32, and its copy in float64."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Of a model that was read from a GGUF, transformers' own method refuses that.
        self.exact = torch.nn.Module.double(deepcopy(model))

    @torch.inference_mode()
    def check(self, *texts: tuple[list[int], NDArray[np.float32]]) -> None:
        """Assert that these are the token ids and the logits of texts."""
        every = []
        for token_ids, logits_TV in texts:
            ids = torch.tensor([token_ids])
            exact = self.exact(ids).logits[0]
            assert logits_TV.shape == exact.shape
            results = (tensor_of(logits_TV), self.model(ids).logits[0])
            ours, theirs = (one.double() - exact for one in results)
            largest = MOST_OF_THEIR_LARGEST * float(theirs.abs().max())
            assert float(ours.abs().max()) <= largest
            every.append([float(one.square().sum()) for one in (ours, theirs)])
        of_ours, of_theirs = np.sqrt(np.sum(every, axis=0))
        assert of_ours <= MOST_OF_THEIR_RMS * of_theirs
