"""Draft with the model's own multi-token-prediction layers.

Row p of the first layer pairs the main model's residual stream at position p with token p + 1, and
its last row drafts the token after those known. Row p of layer k (from 0) pairs the output of the
layer before with token p + 1 + k. Each layer keeps K and V of its own, one position for each of the
main model's, in the same blocks. Rows are made only of tokens that are certain, so what is kept
holds nothing of rejected drafts; the last k rows of layer k wait for tokens, and are made with the
next ones.

Sources: XiaomiMiMo/MiMo; vLLM's V1 proposer for MiMo (positions, and the layer's own output as the
hidden state of further drafts); arXiv 2412.19437, section 2.2 (several layers in a row).
"""

import time
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np

from thinslice.engine.draft_length import MeasuredSeconds
from thinslice.kernels.arrays import Floats
from thinslice.kernels.paged_kv import PagedKv
from thinslice.model.batch import TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.mtp import PredictionLayer
from thinslice.model.weights import Weights
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
        waited_TD: the same of the first rows, where those come from earlier steps; ``hidden_TD``
            is then of the others.
        next_token_ids: the token after each row.
        blocks: block table of the sequence, with room for the rows, and for one more for
            each draft beyond the first.
        num_drafts: tokens to draft; 0 within a prompt, or to keep in step only.
    """

    start: int
    hidden_TD: Floats
    next_token_ids: list[int]
    blocks: Rows[int]
    num_drafts: int = 1
    waited_TD: Floats | None = None

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.next_token_ids)

    def hidden(self, start: int, stop: int) -> Floats:
        """The residual stream of some of the rows."""
        if self.waited_TD is None:
            return self.hidden_TD[start:stop]
        count = len(self.waited_TD)
        new_TD = self.hidden_TD[max(start - count, 0) : max(stop - count, 0)]
        return np.concatenate([self.waited_TD[start:stop], new_TD])

    def last(self, count: int) -> "CertainRows":
        """A copy of the last of them, or of all."""
        first = max(self.num_rows - count, 0)
        return replace(
            self,
            start=self.start + first,
            hidden_TD=self.hidden(first, self.num_rows).copy(),
            waited_TD=None,
            next_token_ids=self.next_token_ids[first:],
        )


class MTPDrafter:
    """Drafts for the sequences of a batch.

    Each layer drafts one token from the output of the layer before. After the last one, that is fed
    its own output and the draft before, as vLLM and SGLang do. MiMo's only layer is not trained for
    that: its second draft is seldom right.

    Attributes:
        round_seconds: what one more draft takes by the number of sequences, as measured.
        rows_seconds: what taking in new rows takes by their number.

    Args:
        caches: K and V of each layer.
        takes_normed_hidden: the first layer was trained on the residual stream after the main
            model's final norm, as FastMTP's is; Xiaomi's take it before.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        caches: Rows[PagedKv],
        takes_normed_hidden: bool = False,
    ) -> None:
        num_layers = len(weights.predictions)
        assert num_layers == len(caches) > 0, f"{num_layers} layers, {len(caches)} caches"
        self.decoder = decoder
        self.weights = weights
        self.layers = [
            PredictionLayer(decoder, weights, index, cache) for index, cache in enumerate(caches)
        ]
        self.block_size = caches[0].block_size
        self.takes_normed_hidden = takes_normed_hidden
        self.round_seconds = MeasuredSeconds(unknown=0.0)
        self.rows_seconds = MeasuredSeconds(unknown=0.0)

    def propose(self, sequences: Rows[CertainRows]) -> list[list[int]]:
        """Take in the new rows of one sequence or more and draft what comes after them.

        Returns ``num_drafts`` token ids for each sequence. K and V that drafts beyond the first
        leave behind are written again by the next rows.

        Time: each layer once over all rows, and one of them over one row for each further draft;
        the head over one row for each draft. Extra memory: 4 D for each of up to PREDICTION_ROWS
        rows, the layer's activations of those, and B V logits.
        """
        last = self._take_in(sequences)
        drafts: list[list[int]] = [[] for _ in sequences]
        outputs = dict(enumerate(last[0]))
        for num_drafted in range(max(one.num_drafts for one in sequences)):
            start = time.perf_counter()
            drafting = [i for i, one in enumerate(sequences) if one.num_drafts > num_drafted]
            if num_drafted > 0:
                index = min(num_drafted, len(self.layers) - 1)
                if index == num_drafted:
                    # Rows of certain tokens end earlier in each layer; between them and the new
                    # draft stand those of the drafts before.
                    before = {i: [outputs[i]] if index > 1 else [] for i in drafting}
                    hidden = [_joined([last[index - 1][i], *before[i]]) for i in drafting]
                else:
                    hidden = [outputs[i][-1:] for i in drafting]
                runs = [
                    _rows_of_drafts(sequences[i], drafts[i], len(rows), index)
                    for i, rows in zip(drafting, hidden, strict=True)
                ]
                outputs = dict(zip(drafting, self._run_each(index, hidden, runs), strict=True))
            out_BD = _joined([outputs[i][-1:] for i in drafting])
            head = self.weights.head
            token_ids = self.weights.ops.linear(out_BD, head).argmax(-1).tolist()
            for i, token_id in zip(drafting, token_ids, strict=True):
                drafts[i].append(token_id)
            self.round_seconds.record(len(drafting), time.perf_counter() - start)
        return drafts

    def _take_in(self, sequences: Rows[CertainRows]) -> list[list[Floats]]:
        """Run the new rows, so many at a time.

        Returns of each layer and sequence the output of its last row, or none where it has no row:
        [1, D] or [0, D].
        """
        last = [[one.hidden_TD[:0] for one in sequences] for _ in self.layers]
        for parts in _parts_of(sequences):
            start = time.perf_counter()
            hidden = [sequences[i].hidden(rows.start, rows.stop) for i, rows in parts]
            if self.takes_normed_hidden:
                hidden = [self.decoder.norm(one, self.weights) for one in hidden]
            for index, last_of_layer in enumerate(last):
                runs = [_new_rows(sequences[i], rows, index) for i, rows in parts]
                hidden = self._run_each(index, hidden, runs)
                for (i, _), out_TD in zip(parts, hidden, strict=True):
                    if len(out_TD) > 0:
                        last_of_layer[i] = out_TD[-1:]
            num_rows = sum(rows.stop - rows.start for _, rows in parts)
            self.rows_seconds.record(num_rows, time.perf_counter() - start)
        return last

    def _run_each(self, index: int, hidden: list[Floats], runs: list[TokenRun]) -> list[Floats]:
        """The outputs of each run's rows, of which some may have none."""
        counts = [len(run.token_ids) for run in runs]
        if not any(counts):
            return [one[:0] for one in hidden]
        used = [one[:count] for one, count in zip(hidden, counts, strict=True) if count]
        out_TD = self._run(index, _joined(used), [run for run in runs if run.token_ids])
        return np.split(out_TD, np.cumsum(counts)[:-1])

    def _run(self, index: int, hidden_TD: Floats, runs: list[TokenRun]) -> Floats:
        """Rows through one of the layers."""
        batch = pack(runs, self.block_size)
        embedding_TD = self.weights.embed(batch.token_ids_T)
        out_TD: Floats = self.layers[index].predict(hidden_TD, embedding_TD, batch)
        return out_TD


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


def _joined(rows: list[Floats]) -> Floats:
    """One below the other; a copy only where there are several."""
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _new_rows(sequence: CertainRows, rows: slice, index: int) -> TokenRun:
    """Return the rows of layer ``index`` whose input tokens are known (shifted by ``index``)."""
    token_ids = sequence.next_token_ids[rows.start + index : rows.stop + index]
    return TokenRun(token_ids, sequence.start + rows.start, sequence.blocks)


def _rows_of_drafts(sequence: CertainRows, drafts: list[int], count: int, index: int) -> TokenRun:
    """The last ``count`` drafts in a layer. The last one stands in the row of the last certain
    token's, or, where the layer has drafted there before, in one of the rows after that."""
    stop = sequence.start + sequence.num_rows + len(drafts) - index
    return TokenRun(drafts[-count:], stop - count, sequence.blocks)
