"""Processor: the parts of a plan where the processor computes, in one pool."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

from thinslice.errors import ConfigError
from thinslice.plan import choose
from thinslice.plan.case import Case, Platform, Tokens, Workload
from thinslice.plan.cost import (
    CALLER_BYTES,
    LOADING_BYTES,
    PREDICTION_ROWS,
    Computation,
    activation_bytes,
    library_bytes,
    logits_bytes,
    ngram_index_bytes,
    prediction_activation_bytes,
    whole_stream_bytes,
)
from thinslice.plan.memory_plan import DraftPlan, MemoryPlan, Pool, StreamingPlan
from thinslice.plan.pinning import aligned, most_bytes
from thinslice.plan.search import kv_cache_bytes
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.plan.weight_layout import FLOAT_BYTES
from thinslice.units import KIB, MIB

_PAGE = 4096


@dataclass(frozen=True)
class Processor(Platform):
    """The processor, whose one pool is the memory of the process."""

    # The largest hides a slice's fixed cost, smaller ones leave more for pinning.
    slice_sizes = (8 * MIB, 2 * MIB, 512 * KIB)
    num_buffers = 6
    alignment = 1
    has_int8_cache = True

    @classmethod
    def of(cls, budget_bytes: int, runtime_bytes: int) -> Self:
        """Plan in a budget.

        Args:
            runtime_bytes: what the process holds before the model is loaded, as measured.
        """
        return cls((Pool("--memory", budget_bytes, (("runtime", runtime_bytes),)),))

    def check(self, case: Case) -> None:
        if case.workload.draft == "mtp" and not case.layout.prediction:
            missing = "this model has no multi-token-prediction layer; --draft ngram needs none"
            raise ConfigError(f"--draft mtp: {missing}")

    def drafts(self, case: Case) -> tuple[DraftPlan | None, ...]:
        wanted, length = case.workload.draft, case.workload.draft_length
        if wanted == "off":
            return (None,)
        hidden, count = case.workload.mtp_hidden, case.shape.num_nextn_predict_layers
        drafts = [DraftPlan(wanted != "mtp", count * (wanted == "mtp"), length, mtp_hidden=hidden)]
        if wanted == "auto" and case.layout.prediction:
            drafts.insert(0, replace(drafts[0], num_mtp_layers=count))
        return tuple(drafts)

    def packing_floor_bytes(self, workload: Workload) -> int:
        beyond = workload.packing_bytes(workload.dtype)
        return 0 if beyond is None else self.pools[0].peak_bytes + beyond

    def candidates(self, case: Case) -> Iterator[MemoryPlan]:
        """Plans by the rule of choose.py; none where the files cannot be packed in the budget."""
        if self.pools[0].budget_bytes >= self.packing_floor_bytes(case.workload):
            yield from choose.candidates(case)

    def buffer_bytes(self, sweep: SweepBytes) -> int:
        """A direct read of a slice at any offset takes a page more on either side."""
        return aligned(sweep.largest_stored, _PAGE) + 2 * _PAGE

    def most_slices(self, sizes: Sequence[int], room: int, beside: Callable[[int], int]) -> int:
        return most_bytes(sizes, room, beside)

    def pools_of(
        self, case: Case, tokens: Tokens, streaming: StreamingPlan | None
    ) -> tuple[Pool, ...]:
        layout, how = case.layout, _computation(case)
        parts = {
            "runtime": CALLER_BYTES + library_bytes(case.shape, how),
            "weights": layout.kept_bytes if streaming is None else layout.vector_bytes,
            "kv cache": kv_cache_bytes(case, tokens.context),
            "activations": _activation_bytes(case, tokens, how),
            **_drafting_part(case, tokens.context, tokens.chunk),
            **case.reserved_parts(tokens.context),
        }
        if streaming is not None:
            sweep = layout.sweep_bytes(streaming.slice_bytes)
            parts["weights"] += sum(sweep.kept[len(sweep.kept) - streaming.num_pinned :])
            parts["weight ring"] = self.num_buffers * streaming.buffer_bytes + sweep.converting
            if streaming.layer_rows is not None:
                parts["held layer"] = sweep.largest_layer_bytes
        return (self.pools[0].with_more(parts),)


def _computation(case: Case) -> Computation:
    """How a forward pass is computed, as far as it matters to its memory."""
    return Computation(
        ffn_block=case.ffn_block,
        is_packed=case.workload.dtype not in FLOAT_BYTES,
        num_threads=case.workload.num_threads,
    )


def _activation_bytes(case: Case, tokens: Tokens, how: Computation) -> int:
    """The most of what one layer, the head and reading the weights work in."""
    shape, chunk, num_rows = case.shape, tokens.chunk, tokens.layer_rows
    if case.num_mtp_layers:
        num_rows = max(num_rows, min(chunk, PREDICTION_ROWS))
    running = activation_bytes(shape, num_rows, how)
    if tokens.layer_rows < chunk:
        running += whole_stream_bytes(shape, chunk)
    # The residual stream is alive while the head runs, and so are the rows of it that the head
    # takes, which are all where a text is scored.
    heading = logits_bytes(shape, min(case.workload.max_num_seqs, chunk))
    heading += 2 * chunk * shape.hidden_size * 4
    return max(running, heading, LOADING_BYTES)


def _drafting_part(case: Case, context: int, chunk: int) -> dict[str, int]:
    """What drafting adds, beside a prediction layer's K and V: n-gram indexes, logits of the rows
    behind drafts, the prediction layers and what they work on."""
    draft, shape = case.draft, case.shape
    if draft is None:
        return {}
    num_seqs = min(case.workload.max_num_seqs, chunk)
    num_rows = min(num_seqs * (1 + draft.length), chunk)
    one, all_rows = (logits_bytes(shape, rows) for rows in (num_seqs, num_rows))
    num_bytes = all_rows - one
    if draft.uses_ngram:
        num_bytes += num_seqs * ngram_index_bytes(context)
    if draft.num_mtp_layers:
        num_bytes += case.layout.prediction_bytes
        num_bytes += prediction_activation_bytes(shape, chunk, num_seqs)
    return {"drafting": num_bytes}
