"""Runner: from scheduled tokens to the logits of the rows that are sampled."""

import os
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import numpy as np

from thinslice.engine.scheduler import ScheduledTokens
from thinslice.engine.scoring import Scores
from thinslice.errors import RequestError
from thinslice.kernels.arrays import Array, Floats
from thinslice.kernels.paged_kv import PagedKv
from thinslice.memory.device import Device
from thinslice.memory.spilled_kv import BlockMove, SpilledKv
from thinslice.model.batch import ForwardBatch, TokenRun, pack
from thinslice.model.decoder import Decoder
from thinslice.model.weights import Weights


class Runner:
    """Holds the model and its KV cache, and runs batches through them.

    Attributes:
        device: that the model lies on; None where it is the processor. Logits come back from it.
        spilled: blocks of the KV cache in host memory; None where the plan has no room for any.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: Weights,
        kv_caches: Rows[PagedKv],
        block_size: int,
    ) -> None:
        self.decoder = decoder
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.weights = weights
        self.device: Device | None = None
        self.spilled: SpilledKv | None = None
        self._pid = os.getpid()

    def check(self) -> None:
        """Whether it can run.

        A child of a fork has none of the threads that read weights; the compiled kernels start
        theirs anew.

        Errors: RequestError in a child of the process that loaded the model, but for one in memory;
        and where weights were replaced in part.
        """
        if not self.weights.is_whole:
            raise RequestError(
                "weights were replaced in part, as somebody was interrupted; replace them again"
            )
        if self._pid == os.getpid():
            return
        if self.weights.source.streams or self.device is not None:
            raise RequestError(
                f"this model was loaded by process {self._pid} before a fork and cannot run in "
                "its child; load it in the child, or start the child with spawn"
            )

    def move_blocks(self, moves: deque[BlockMove]) -> None:
        """Copy blocks to host memory and back, and take them off the queue."""
        if moves:
            assert self.spilled is not None, "a block is moved and there is nowhere to move it"
            with self._computing():
                self.spilled.move(moves)

    def run(
        self, scheduled: Rows[ScheduledTokens], scores: Scores | None = None
    ) -> tuple[Floats, Array]:
        """Run the scheduled tokens.

        Args:
            scores: take the logits of the rows that are scored; None where there are none.

        Returns the logits [rows, V] of the rows that are sampled, in the order of ``scheduled`` the
        last ``num_rows`` of each; and the residual stream [T, D] of all rows, which a prediction
        layer takes.
        """
        batch = self._pack(scheduled)
        self.weights.source.begin_sweep()
        rows = _last_rows(scheduled, [tokens.num_rows for tokens in scheduled])
        with self._computing():
            hidden_TD = self.decoder.forward(batch, self.weights, self.kv_caches)
            if scores is not None:
                scored = _last_rows(scheduled, [tokens.num_scored for tokens in scheduled])
                return self._score(hidden_TD[[*rows, *scored]], len(rows), scores), hidden_TD
            if not rows:
                return np.empty((0, self.decoder.shape.vocab_size), np.float32), hidden_TD
            return self.decoder.logits(hidden_TD[rows], self.weights), hidden_TD

    def _score(self, x_TD: Array, num_sampled: int, scores: Scores) -> Floats:
        """The logits of the first rows, which are sampled; the others' go to the scores.

        All in one pass over the head, as it may stream by.
        """
        vocab_size = self.decoder.shape.vocab_size
        logits_RV = np.empty((num_sampled, vocab_size), np.float32)
        room = max(scores.most_rows - num_sampled, 1) * vocab_size
        for first, first_id, tile_TV in self.decoder.logit_tiles(x_TD, self.weights, room):
            count = min(max(num_sampled - first, 0), len(tile_TV))
            columns = slice(first_id, first_id + tile_TV.shape[1])
            logits_RV[first : first + count, columns] = tile_TV[:count]
            if count < len(tile_TV):
                scores.add(max(first - num_sampled, 0), first_id, tile_TV[count:])
        return logits_RV

    def all_logits(self, tokens: ScheduledTokens, tile: int) -> Iterator[Floats]:
        """Run the scheduled tokens; logits [rows, V] of all of them, a tile at a time.

        Where weights stream, a tile must hold all tokens: the head passes by once in a sweep.
        """
        streams = self.weights.source.streams
        assert not streams or tokens.count <= tile, f"{tokens.count} rows, tile {tile}"
        self.weights.source.begin_sweep()
        batch = self._pack([tokens])
        with self._computing():
            hidden_TD = self.decoder.forward(batch, self.weights, self.kv_caches)
        for start in range(0, len(hidden_TD), tile):
            with self._computing():
                logits = self.decoder.logits(hidden_TD[start : start + tile], self.weights)
            yield logits

    def _pack(self, scheduled: Rows[ScheduledTokens]) -> ForwardBatch:
        batch = pack([_run_of(tokens) for tokens in scheduled], self.block_size)
        return batch if self.device is None else batch.to(self.device.moved)

    def _computing(self) -> AbstractContextManager[object]:
        """On the device that the model lies on, whatever this thread's own is."""
        return nullcontext() if self.device is None else self.device.current()

    def close(self) -> None:
        """Stop reading weights, and let host memory go; a second time nothing happens."""
        try:
            if self.spilled is not None:
                self.spilled.close()
        finally:
            self.weights.source.close()


def _run_of(tokens: ScheduledTokens) -> TokenRun:
    sequence = tokens.sequence
    first = sequence.num_computed
    return TokenRun(sequence.tokens(first, first + tokens.count), first, sequence.blocks)


def _last_rows(scheduled: Rows[ScheduledTokens], counts: list[int]) -> list[int]:
    """The last rows of each, so many of each."""
    stops = accumulate(tokens.count for tokens in scheduled)
    return [
        row for count, stop in zip(counts, stops, strict=True) for row in range(stop - count, stop)
    ]
