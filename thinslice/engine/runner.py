"""Runner: from scheduled tokens to the logits of the rows that are sampled."""

from collections.abc import Sequence as Rows

import torch

from thinslice.engine.scheduler import ScheduledTokens
from thinslice.memory.weight_store import WeightStore
from thinslice.model.batch import ForwardBatch, SequenceSpan
from thinslice.model.decoder import Decoder, KVCaches


class Runner:
    """Holds the model and its KV cache, and runs batches through them.

    ``weights`` is None where all are resident.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_caches: KVCaches,
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

    def close(self) -> None:
        """Stop reading weights."""
        if self.weights is not None:
            self.weights.close()

    def _batch(self, scheduled: Rows[ScheduledTokens]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        spans: list[SequenceSpan] = []
        for tokens in scheduled:
            sequence = tokens.sequence
            first, last = sequence.num_computed, sequence.num_computed + tokens.count
            start = len(token_ids)
            token_ids += sequence.tokens(first, last)
            position = torch.arange(first, last)
            positions.append(position)
            num_blocks = -(-last // self.block_size)
            block_table = torch.tensor(sequence.blocks[:num_blocks])
            in_block = position % self.block_size
            slots.append(block_table[position // self.block_size] * self.block_size + in_block)
            spans.append(SequenceSpan(start, len(token_ids), last, block_table))
        return ForwardBatch(torch.tensor(token_ids), torch.cat(positions), torch.cat(slots), spans)
