"""Speculative decoding in the plainest way, for tests of its parts: no scheduler, no budget."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thinslice.checkpoint.open import open_checkpoint
from thinslice.checkpoint.reader import CheckpointReader
from thinslice.config import SamplingParams
from thinslice.engine import sequence as engine_sequence
from thinslice.engine.draws import Draws
from thinslice.engine.mtp_drafter import CertainRows, MTPDrafter
from thinslice.engine.sampler import best_tokens, sample_rows
from thinslice.kernels.arrays import FLOAT_DTYPES
from thinslice.kernels.native_ops import NATIVE
from thinslice.kernels.native_pack import converted
from thinslice.kernels.ops import Linear
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.resident import LoadedDtypes, load_resident
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.weights import Weights
from thinslice.plan.model_shape import ModelShape

SMALL_MTP = Path(__file__).parent / "models" / "small_mtp"
BLOCK_SIZE, MAX_POSITIONS = 16, 320
# Stands between verification and the drafter; a planted fault changes the rows.
Change = Callable[[CertainRows, list[int]], CertainRows]


def load_small_mtp() -> Weights:
    """The small trained model in float32."""
    checkpoint = open_checkpoint(SMALL_MTP)
    with CheckpointReader(checkpoint) as reader:
        dtypes = LoadedDtypes(np.dtype(np.float32), np.dtype(np.float32))
        source = load_resident(reader, dtypes, has_predictions=True)
    return Weights(checkpoint.shape, source, NATIVE, has_predictions=True)


def empty_caches(
    shape: ModelShape, num_sequences: int, count: int, dtype: np.dtype = FLOAT_DTYPES["float32"]
) -> list[PagedKv]:
    """K and V of so many layers; garbage where nothing has been written, as in an engine."""
    num_blocks = num_sequences * MAX_POSITIONS // BLOCK_SIZE
    size = (num_blocks, shape.num_key_value_heads, BLOCK_SIZE, shape.head_dim)
    nines = np.full(size, 9.0, np.float32)
    return [
        PagedKv(converted(nines, dtype).copy(), converted(-nines, dtype).copy())
        for _ in range(count)
    ]


def cached(cache: PagedKv, blocks: list[int], count: int) -> list[NDArray[np.generic]]:
    """K and V of a sequence's first positions, [K, S, H]."""
    used = blocks[: -(-count // BLOCK_SIZE)]
    return [np.concatenate([*one[used]], axis=1)[:, :count] for one in (cache.k, cache.v)]


def from_scratch(
    weights: Weights,
    token_ids: list[int],
    num_drafts: int,
    num_kept: int | None = None,
    kv_dtype: np.dtype = FLOAT_DTYPES["float32"],
) -> tuple[list[NDArray[np.generic]], list[int]]:
    """K and V of each prediction layer of a whole text's rows, all run at once, or of the first so
    many; and the drafts after it."""
    shape, decoder = weights.shape, Decoder(weights.shape)
    count, num_main = len(token_ids) - 1, shape.num_hidden_layers
    caches = empty_caches(shape, 1, num_main + shape.num_nextn_predict_layers, kv_dtype)
    # What an engine fused writes into the engine's caches.
    weights = copy(weights)
    weights.fused, weights.fused_predictions = None, [None] * shape.num_nextn_predict_layers
    blocks = list(range(caches[0].k.shape[0]))
    batch = pack([TokenRun(token_ids[:-1], 0, blocks)], BLOCK_SIZE)
    hidden = decoder.forward(batch, weights, caches[:num_main])
    drafter = MTPDrafter(decoder, weights, caches[num_main:])
    rows = CertainRows(0, hidden, token_ids[1:], blocks, num_drafts)
    (drafts,) = drafter.propose([rows])
    kept = [one for cache in caches[num_main:] for one in cached(cache, blocks, num_kept or count)]
    return kept, drafts


def unchanged(rows: CertainRows, drafts: list[int]) -> CertainRows:
    """No fault."""
    return rows


@dataclass
class Run:
    """One sequence: its blocks, the drafts for its next step, and what became of earlier ones.

    ``num_drafts`` are drafted in each step once the prompt is through.
    """

    sequence: engine_sequence.Sequence
    blocks: list[int]
    num_drafts: int
    drafts: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.num_accepted / self.num_drafted


class Speculation:
    """The main model and its prediction layer over one paged cache.

    Args:
        num_drafts: tokens drafted for each sequence and step.
        end_ids: tokens that end a sequence.
        change: a planted fault.
    """

    def __init__(
        self,
        weights: Weights,
        prompts: Sequence[list[int]],
        num_drafts: int = 1,
        end_ids: tuple[int, ...] = (),
        change: Change = unchanged,
    ) -> None:
        self.weights, self.decoder = weights, Decoder(weights.shape)
        self.end_ids, self.change = end_ids, change
        caches = empty_caches(weights.shape, len(prompts), weights.shape.num_hidden_layers + 1)
        self.main_caches, self.mtp_caches = caches[:-1], caches[-1]
        self.drafter = MTPDrafter(self.decoder, weights, [self.mtp_caches])
        # Blocks of a sequence lie apart, so that a wrong one is seen.
        tables = np.arange(caches[0].k.shape[0]).reshape(-1, len(prompts)).T[:, ::-1]
        params = SamplingParams(temperature=0)
        self.runs = [
            Run(
                engine_sequence.Sequence(i, prompt, params, MAX_POSITIONS, Draws(0)),
                tables[i].tolist(),
                num_drafts,
            )
            for i, prompt in enumerate(prompts)
        ]

    def generate(self, count: int) -> list[list[int]]:
        """At least ``count`` tokens after each prompt, or all to its end."""
        while active := [run for run in self.runs if not self._is_finished(run, count)]:
            self.step(active)
        return [run.sequence.completion_token_ids for run in self.runs]

    def step(self, runs: list[Run], chunk: int = MAX_POSITIONS) -> None:
        """Up to ``chunk`` tokens of each sequence through the model, then verify and draft."""
        fed = []
        for run in runs:
            first = run.sequence.num_computed
            fed.append(run.sequence.tokens(first, first + chunk) + run.drafts)
        hidden = self._forward(runs, fed)
        rows = [self._advance(*one) for one in zip(runs, fed, hidden, strict=True)]
        for run, drafts in zip(runs, self.drafter.propose(rows), strict=True):
            run.drafts = drafts

    def _advance(self, run: Run, fed: list[int], hidden: NDArray[np.float32]) -> CertainRows:
        """Verify where the prompt is through; the rows that are certain now."""
        sequence, drafts = run.sequence, run.drafts
        start, count = sequence.num_computed, len(fed) - len(drafts)
        num_drafts = 0
        if count == sequence.num_uncomputed:
            logits = self.decoder.logits(hidden[count - 1 :], self.weights)
            drafted = replace(sequence, draft_token_ids=list(drafts))
            tokens = sample_rows(logits, best_tokens(logits), drafted).token_ids
            count += len(tokens) - 1
            run.num_drafted += len(drafts)
            run.num_accepted += len(tokens) - 1
            sequence.completion_token_ids += self._cut(tokens)
            count = min(count, sequence.num_tokens - 1 - start)
            num_drafts = run.num_drafts
        sequence.num_computed += count
        next_ids = sequence.tokens(start + 1, start + 1 + count)
        rows = CertainRows(start, hidden[:count], next_ids, run.blocks, num_drafts)
        return self.change(rows, drafts)

    def _forward(self, runs: list[Run], fed: list[list[int]]) -> list[NDArray[np.float32]]:
        packed = [
            TokenRun(tokens, run.sequence.num_computed, run.blocks)
            for run, tokens in zip(runs, fed, strict=True)
        ]
        batch = pack(packed, BLOCK_SIZE)
        hidden = self.decoder.forward(batch, self.weights, self.main_caches)
        return [hidden[span.start : span.stop] for span in batch.sequences.spans]

    def _cut(self, tokens: list[int]) -> list[int]:
        for place, token_id in enumerate(tokens):
            if token_id in self.end_ids:
                return tokens[: place + 1]
        return tokens

    def _is_finished(self, run: Run, count: int) -> bool:
        completion = run.sequence.completion_token_ids
        return len(completion) >= count or completion[-1:] in ([one] for one in self.end_ids)


def embedding_first(weights: Weights) -> None:
    """A planted fault: the halves of the concatenation the other way round."""
    (layer,) = weights.predictions
    whole = layer.pairing.whole
    assert isinstance(whole, np.ndarray)
    first, second = np.split(whole, 2, axis=1)
    pairing = Linear.resident(np.concatenate((second, first), axis=1))
    weights.predictions = (replace(layer, pairing=pairing),)
