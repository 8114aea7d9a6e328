"""Draft with the model's own multi-token-prediction layer.

Row p of the layer pairs the main model's residual stream at position p with token p + 1, and its
last row drafts the token after those known. The layer keeps K and V of its own, one position for
each of the main model's, in the same blocks. Rows are made only of positions whose tokens are
certain, so what is kept holds nothing of rejected drafts.

Sources: XiaomiMiMo/MiMo; vLLM's V1 proposer for MiMo (positions, and the layer's own output as the
hidden state of further drafts).
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from itertools import accumulate, compress

import torch
from torch import nn

from thinslice.engine.measured_seconds import MeasuredSeconds
from thinslice.kernels.paged_kv import PagedKv
from thinslice.model.batch import ForwardBatch, TokenRun, pack
from thinslice.model.decoder import LayerContext
from thinslice.model.mtp import MTPDecoder, MTPLayer
from thinslice.plan.cost import PREDICTION_ROWS


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
        blocks: block table of the sequence, with room for the rows, and for one more for
            each draft beyond the first.
        num_drafts: tokens to draft; 0 within a prompt, or to keep in step only.
    """

    start: int
    hidden_TD: torch.Tensor
    next_token_ids: list[int]
    blocks: Rows[int]
    num_drafts: int = 1

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.next_token_ids)

    def first(self, count: int) -> "CertainRows":
        """The first of them, or all."""
        return replace(
            self,
            hidden_TD=self.hidden_TD[:count],
            next_token_ids=self.next_token_ids[:count],
        )


class MTPDrafter:
    """Drafts for the sequences of a batch.

    The first layer drafts; for more than one token it is fed its own output and the draft before,
    as vLLM and SGLang do. MiMo's layer is not trained for that: its second draft is seldom right.

    Attributes:
        round_seconds: what one more draft takes by the number of sequences, as measured.
        rows_seconds: what taking in new rows takes by their number.

    Args:
        cache: K and V of the layer.
        takes_normed_hidden: the layer was trained on the residual stream after the main model's
            final norm, as FastMTP's is; Xiaomi's take it before.
    """

    def __init__(
        self,
        decoder: MTPDecoder,
        cache: PagedKv,
        takes_normed_hidden: bool = False,
    ) -> None:
        layers = decoder.model.mtp_layers
        assert isinstance(layers, nn.ModuleList)
        assert len(layers) > 0, "the model has no prediction layer"
        layer = layers[0]
        assert isinstance(layer, MTPLayer)
        self.decoder = decoder
        self.layer = layer
        self.cache = cache
        self.takes_normed_hidden = takes_normed_hidden
        self.round_seconds = MeasuredSeconds(unknown=0.0)
        self.rows_seconds = MeasuredSeconds(unknown=0.0)

    @torch.inference_mode()
    def propose(self, sequences: Rows[CertainRows]) -> list[list[int]]:
        """Take in the new rows of one sequence or more and draft what comes after them.

        Rows of one sequence may come in several parts, one after the other.
        Returns ``num_drafts`` token ids for each sequence. K and V that drafts beyond the first
        leave behind the last row are written again by the next rows.

        Time: the layer once over all rows, and again over one row for each further draft; the head
        over one row for each draft. Extra memory: 4 D for each of up to PREDICTION_ROWS rows, the
        layer's activations of those, and B V logits.
        """
        out_BD = self._take_in(sequences)
        drafts: list[list[int]] = [[] for _ in sequences]
        drafting = [*range(len(sequences))]
        for num_drafted in range(max(one.num_drafts for one in sequences)):
            start = time.perf_counter()
            kept = [sequences[i].num_drafts > num_drafted for i in drafting]
            if not all(kept):
                out_BD, drafting = out_BD[torch.tensor(kept)], [*compress(drafting, kept)]
            if num_drafted > 0:
                rows = [_row_of_draft(sequences[i], drafts[i]) for i in drafting]
                out_BD = self._run(out_BD, pack(rows, self.cache.block_size))
            token_ids = self.decoder.lm_head(out_BD).argmax(-1).tolist()
            for i, token_id in zip(drafting, token_ids, strict=True):
                drafts[i].append(token_id)
            self.round_seconds.record(len(drafting), time.perf_counter() - start)
        return drafts

    def _take_in(self, sequences: Rows[CertainRows]) -> torch.Tensor:
        """Run the new rows, so many at a time; the output [B, D] of each sequence's last one."""
        outputs: dict[int, torch.Tensor] = {}
        for parts in _parts_of(sequences):
            start = time.perf_counter()
            hidden_TD = _joined([sequences[i].hidden_TD[rows] for i, rows in parts])
            if self.takes_normed_hidden:
                hidden_TD = self.decoder.model.norm(hidden_TD)
            runs = [_new_rows(sequences[i], rows) for i, rows in parts]
            out_TD = self._run(hidden_TD, pack(runs, self.cache.block_size))
            stops = accumulate(len(run.token_ids) for run in runs)
            # Of a sequence in several parts, the last one's stays.
            outputs |= {
                i: out_TD[stop - 1 : stop] for (i, _), stop in zip(parts, stops, strict=True)
            }
            self.rows_seconds.record(len(out_TD), time.perf_counter() - start)
        return _joined([outputs[i] for i in range(len(sequences))])

    def _run(self, hidden_TD: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        embedding_TD = self.decoder.model.embed_tokens(batch.token_ids_T)
        cos_TR, sin_TR = self.decoder.rotary.tables(batch.positions_T)
        context = LayerContext(batch, cos_TR, sin_TR, self.cache)
        return self.layer.predict(hidden_TD, embedding_TD, context)


def _parts_of(sequences: Rows[CertainRows]) -> Iterator[list[tuple[int, slice]]]:
    """Sequences and rows of theirs to run at once: at most PREDICTION_ROWS in all, in order."""
    parts: list[tuple[int, slice]] = []
    room = PREDICTION_ROWS
    for index, sequence in enumerate(sequences):
        start, count = 0, len(sequence.next_token_ids)
        while start < count:
            stop = min(start + room, count)
            parts.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield parts
                parts, room = [], PREDICTION_ROWS
    if parts:
        yield parts


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    """One below the other; a copy only where there are several."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _new_rows(sequence: CertainRows, rows: slice) -> TokenRun:
    return TokenRun(sequence.next_token_ids[rows], sequence.start + rows.start, sequence.blocks)


def _row_of_draft(sequence: CertainRows, drafts: list[int]) -> TokenRun:
    """The last draft, at the position after the row that it was read from."""
    position = sequence.start + len(sequence.next_token_ids) + len(drafts) - 1
    return TokenRun(drafts[-1:], position, sequence.blocks)
