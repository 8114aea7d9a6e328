"""Exact verification: drafts and the model's logits in, tokens of the model's own choice out.

Each row is sampled as if there were no draft; the draft is accepted where it is the token sampled,
and the first row where it is not ends the run with that token. This is rejection sampling for a
drafter that puts all its mass on one token (arXiv 2211.17192): draft x is accepted with probability
p(x), and what takes its place is distributed as p without x, renormalised. And because each token
takes one number from the sequence's generator, as it does without drafts, a seed gives the text it
gives without drafts.
"""

from collections.abc import Sequence as Row
from dataclasses import replace

import torch

from thinslice.engine.sampler import sample
from thinslice.engine.sequence import Sequence


def verify(logits_TV: torch.Tensor, drafts: Row[int], sequence: Sequence) -> list[int]:
    """The next tokens of a sequence: the drafts accepted, and one more.

    Args:
        logits_TV: float32; row i follows the sequence's tokens and the first i drafts.
        drafts: proposed tokens, one fewer than there are rows.

    The sequence is left as it was but for its generator, which is one number further for each
    token returned where tokens are drawn. The caller cuts the tokens at the first that ends the
    sequence. Rows after the first rejected draft are not looked at.
    Extra memory: that of ``sample``, and the completion's ids once.
    """
    assert len(logits_TV) == len(drafts) + 1, f"{len(logits_TV)} rows, {len(drafts)} drafts"
    tokens: list[int] = []
    for row, draft in zip(logits_TV, (*drafts, None), strict=True):
        # Penalties count the tokens accepted so far.
        completion = sequence.completion_token_ids + tokens
        tokens.append(sample(row, replace(sequence, completion_token_ids=completion)))
        if tokens[-1] != draft:
            break
    return tokens
