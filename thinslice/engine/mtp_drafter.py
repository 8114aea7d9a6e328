"""Draft with the model's own multi-token-prediction layer.

Row p of the layer pairs the main model's residual stream at position p with token p + 1, and its
last row drafts the token after those known. The layer keeps K and V of its own, one position for
each of the main model's, in the same blocks. Rows are made only of positions whose tokens are
certain, so what is kept holds nothing of rejected drafts.

Sources: XiaomiMiMo/MiMo; vLLM's V1 proposer for MiMo (positions, and the layer's own output as the
hidden state of further drafts).
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import nn

from thinslice.model.batch import ForwardBatch, SequenceSpan
from thinslice.model.decoder import LayerContext
from thinslice.model.mtp import MTPDecoder, MTPLayer

# First position, token ids and block table of one sequence.
_Span = tuple[int, list[int], torch.Tensor]


@dataclass(frozen=True)
class CertainRows:
    """The rows of one sequence that the last step made certain.

    After a prompt chunk these are all its positions; the token after a prompt's last is the one
    sampled. After a verified draft they are the position that was sampled from and those of the
    accepted drafts; the token after the last is the correction or the bonus.

    Attributes:
        start: position of the first row; the rows before it have been given.
        hidden_TD: residual stream of the main model, before its final norm.
        next_token_ids: the token after each row.
        block_table: blocks of the sequence, int64, with room for the rows, and for one more for
            each draft beyond the first.
        num_drafts: tokens to draft; 0 within a prompt, or to keep in step only.
    """

    start: int
    hidden_TD: torch.Tensor
    next_token_ids: list[int]
    block_table: torch.Tensor
    num_drafts: int = 1


class MTPDrafter:
    """Drafts for the sequences of a batch.

    The first layer drafts; for more than one token it is fed its own output and the draft before,
    as vLLM and SGLang do. MiMo's layer is not trained for that: its second draft is seldom right.

    Args:
        caches: K and V of the layer, each [num_blocks, K, block_size, H].
        takes_normed_hidden: the layer was trained on the residual stream after the main model's
            final norm, as FastMTP's is; Xiaomi's take it before.
    """

    def __init__(
        self,
        decoder: MTPDecoder,
        caches: tuple[torch.Tensor, torch.Tensor],
        takes_normed_hidden: bool = False,
    ) -> None:
        layers = decoder.model.mtp_layers
        assert isinstance(layers, nn.ModuleList)
        assert len(layers) > 0, "the model has no prediction layer"
        layer = layers[0]
        assert isinstance(layer, MTPLayer)
        self.decoder = decoder
        self.layer = layer
        self.caches = caches
        self.block_size = caches[0].shape[2]
        self.takes_normed_hidden = takes_normed_hidden

    @torch.inference_mode()
    def propose(self, sequences: Rows[CertainRows]) -> list[list[int]]:
        """Take in the new rows of one sequence or more and draft what comes after them.

        Returns ``num_drafts`` token ids for each sequence. K and V that drafts beyond the first
        leave behind the last row are written again by the next rows.

        Time: the layer once over all rows, and again over one row for each further draft; the head
        over one row for each draft. Extra memory: 4 T D, the layer's activations, and B V logits.
        """
        hidden_TD = torch.cat([one.hidden_TD for one in sequences])
        if self.takes_normed_hidden:
            hidden_TD = self.decoder.model.norm(hidden_TD)
        batch = self._pack([(one.start, one.next_token_ids, one.block_table) for one in sequences])
        out_BD = self._run(hidden_TD, batch)[[span.stop - 1 for span in batch.spans]]
        drafts: list[list[int]] = [[] for _ in sequences]
        for num_drafted in range(max(one.num_drafts for one in sequences)):
            drafting = [i for i, one in enumerate(sequences) if one.num_drafts > num_drafted]
            if num_drafted > 0:
                batch = self._pack([_row_of_draft(sequences[i], drafts[i]) for i in drafting])
                out_BD[drafting] = self._run(out_BD[drafting], batch)
            token_ids = self.decoder.lm_head(out_BD[drafting]).argmax(-1).tolist()
            for i, token_id in zip(drafting, token_ids, strict=True):
                drafts[i].append(token_id)
        return drafts

    def _run(self, hidden_TD: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        embedding_TD = self.decoder.model.embed_tokens(batch.token_ids_T)
        cos_TH, sin_TH = self.decoder.rotary.tables(batch.positions_T)
        context = LayerContext(batch, cos_TH, sin_TH, self.caches)
        return self.layer.predict(hidden_TD, embedding_TD, context)

    def _pack(self, rows: Rows[_Span]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[torch.Tensor] = []
        slots: list[torch.Tensor] = []
        spans: list[SequenceSpan] = []
        for first, tokens, block_table in rows:
            last, begin = first + len(tokens), len(token_ids)
            token_ids += tokens
            position = torch.arange(first, last)
            positions.append(position)
            block = block_table[position // self.block_size]
            slots.append(block * self.block_size + position % self.block_size)
            num_blocks = -(-last // self.block_size)
            spans.append(SequenceSpan(begin, len(token_ids), last, block_table[:num_blocks]))
        return ForwardBatch(torch.tensor(token_ids), torch.cat(positions), torch.cat(slots), spans)


def _row_of_draft(sequence: CertainRows, drafts: list[int]) -> _Span:
    """The last draft, at the position after the row that it was read from."""
    position = sequence.start + len(sequence.next_token_ids) + len(drafts) - 1
    return position, drafts[-1:], sequence.block_table
