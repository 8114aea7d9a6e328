"""Runner: from scheduled tokens to the logits of the rows that are sampled."""

from collections.abc import Iterator
from collections.abc import Sequence as Rows

import torch

from thinslice.engine.scheduler import ScheduledTokens
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.weight_store import WeightStore
from thinslice.model.batch import ForwardBatch, TokenRun, pack
from thinslice.model.decoder import Decoder


class Runner:
    """Holds the model and its KV cache, and runs batches through them.

    ``weights`` is None where all are resident.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_caches: Rows[PagedKv],
        block_size: int,
        weights: WeightStore | None,
    ) -> None:
        self.decoder = decoder
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.weights = weights

    @torch.inference_mode()
    def run(self, scheduled: Rows[ScheduledTokens]) -> torch.Tensor:
        """Run the scheduled tokens; logits [rows, V] in float32 of each sequence that is sampled.

        Rows are in the order of ``scheduled``, sequences that are not sampled left out.
        """
        batch = self._batch(scheduled)
        if self.weights is not None:
            self.weights.begin_sweep()
        hidden_TD = self.decoder(batch, self.kv_caches)
        pairs = zip(scheduled, batch.spans, strict=True)
        rows = [span.stop - 1 for tokens, span in pairs if tokens.is_sampled]
        if not rows:
            return torch.empty(0, self.decoder.shape.vocab_size)
        return self.decoder.logits(hidden_TD[rows])

    @torch.inference_mode()
    def score(self, tokens: ScheduledTokens, tile: int) -> Iterator[torch.Tensor]:
        """Run the scheduled tokens; logits [rows, V] in float32 of all of them, a tile at a time.

        Where weights stream, a tile must hold all tokens: the head passes by once in a sweep.
        """
        if self.weights is not None:
            self.weights.begin_sweep()
        hidden_TD = self.decoder(self._batch([tokens]), self.kv_caches)
        for rows_TD in hidden_TD.split(tile):
            yield self.decoder.logits(rows_TD)

    def close(self) -> None:
        """Stop reading weights."""
        if self.weights is not None:
            self.weights.close()

    def _batch(self, scheduled: Rows[ScheduledTokens]) -> ForwardBatch:
        return pack([self._run_of(tokens) for tokens in scheduled], self.block_size)

    def _run_of(self, tokens: ScheduledTokens) -> TokenRun:
        sequence = tokens.sequence
        first = sequence.num_computed
        return TokenRun(sequence.tokens(first, first + tokens.count), first, sequence.blocks)
