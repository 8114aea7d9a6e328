"""What a plan is made for: a shape, its weights, a workload, and the platform that computes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from thinslice.plan.cost import kv_bytes_per_token, vocabulary_bytes
from thinslice.plan.memory_plan import (
    HELD_PARTS,
    DevicePlan,
    DraftPlan,
    MemoryPlan,
    Pool,
    StreamingPlan,
)
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.sweep_bytes import SweepBytes
from thinslice.plan.tensors import Role
from thinslice.plan.weight_layout import WeightLayout


def _runs_as_it_is(dtype: str) -> None:
    """Nothing is packed."""


@dataclass(frozen=True)
class Workload:
    """What is to be run.

    Attributes:
        context: tokens of prompt and completion together; None leaves the choice to the planner.
        max_num_seqs: sequences that may run at once.
        dtype: what to compute the weights with: bfloat16, float32, int8 or int4.
        kv_dtype: KV cache type: bfloat16, float32 or int8; None takes what suits ``dtype``.
        num_threads: the compiled kernels run on.
        can_change_dtype: the model's files can be had with other weights: they are not packed.
        packing_bytes: what packing the files for a dtype takes beyond what the process holds
            already; None where they run in it as they are.
        most_memory: the largest budget that this machine can give the process, where that is known:
            a larger one is not suggested.
        draft: who drafts: auto, ngram, mtp or off.
        draft_length: the most drafts for a sequence in a step.
        mtp_hidden: what a prediction layer takes of the model; see DraftPlan.
        reserve_bytes: what the program around the model will come to hold.
        reserve_per_token: bytes more of that for each token of the context.
        forms: whether the vocabulary that answers of a given form are followed by is a part of the
            plan: ``reserved``; or of the room for answers: ``auto``; or not wanted: ``off``.
    """

    context: int | None = None
    max_num_seqs: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    num_threads: int = 2
    can_change_dtype: bool = True
    packing_bytes: Callable[[str], int | None] = _runs_as_it_is
    most_memory: int | None = None
    draft: str = "off"
    draft_length: int = 8
    mtp_hidden: str = "pre-norm"
    reserve_bytes: int = 0
    reserve_per_token: int = 0
    forms: str = "auto"


@dataclass(frozen=True)
class Tokens:
    """Positions of a sequence, tokens in flight, and how many of them a layer takes at a time."""

    context: int
    chunk: int
    layer_rows: int

    @classmethod
    def at_once(cls, context: int, chunk: int) -> Self:
        """A layer takes all tokens in flight at a time, which are no more than the context has."""
        chunk = min(chunk, context)
        return cls(context, chunk, chunk)


@dataclass(frozen=True)
class Platform(ABC):
    """What computes: all in which plans for a processor and for a card differ.

    Attributes:
        pools: its memories, as in MemoryPlan; what each holds before a model is loaded is its only
            part.
        slice_sizes: the most bytes of a slice, each tried.
        num_buffers: of the ring that slices are streamed through.
        alignment: bytes of which a slice in memory takes a multiple.
        has_int8_cache: whether the KV cache can be int8.
    """

    pools: tuple[Pool, ...]
    slice_sizes: ClassVar[tuple[int, ...]]
    num_buffers: ClassVar[int]
    alignment: ClassVar[int]
    has_int8_cache: ClassVar[bool]

    @property
    def device(self) -> DevicePlan | None:
        """The accelerator, with nothing on the host for it yet; None for the processor."""
        return None

    def with_budget(self, place: int, num_bytes: int) -> Self:
        """The same with another budget of the pool at a place."""
        pools = list(self.pools)
        pools[place] = replace(pools[place], budget_bytes=num_bytes)
        return replace(self, pools=tuple(pools))

    def with_tokenizer(self, num_bytes: int) -> Self:
        """The same with a part of its own for the model's tokenizer, which is among what the
        process holds."""
        held = self.pools[-1].peak_bytes
        parts = zip(HELD_PARTS, (held - num_bytes, num_bytes), strict=True)
        host = replace(self.pools[-1], parts=tuple(parts))
        return replace(self, pools=(*self.pools[:-1], host))

    def packing_floor_bytes(self, workload: Workload) -> int:
        """The least budget that files are packed in before they run; 0 where none is planned."""
        return 0

    @abstractmethod
    def check(self, case: "Case") -> None:
        """Errors: ConfigError for what it, or the model on it, does not do."""

    @abstractmethod
    def drafts(self, case: "Case") -> tuple[DraftPlan | None, ...]:
        """Who may draft, the better one first."""

    @abstractmethod
    def buffer_bytes(self, sweep: SweepBytes) -> int:
        """Bytes of a buffer of the ring."""

    @abstractmethod
    def pools_of(
        self, case: "Case", tokens: Tokens, streaming: StreamingPlan | None
    ) -> tuple[Pool, ...]:
        """The parts of a plan with room for one sequence, before it has grown.

        Args:
            streaming: with the slices pinned that always are; None where weights are resident.
        """

    @abstractmethod
    def most_slices(self, sizes: Sequence[int], room: int, beside: Callable[[int], int]) -> int:
        """The number of slices, spread evenly, that are put into a faster place.

        Args:
            sizes: bytes of each slice that there is; not none.
            room: bytes for the slices and what lies beside them; some number fits.
            beside: bytes of that, for a number of slices.
        """

    @abstractmethod
    def candidates(self, case: "Case") -> Iterator[MemoryPlan]:
        """Plans to try, the best first."""

    def on_host(self, case: "Case", chosen: MemoryPlan) -> MemoryPlan:
        """Use what the process's memory has left, where that is not what is computed in."""
        return chosen


@dataclass(frozen=True)
class Case:
    """What a plan is made for; ``draft`` is one of those that the workload leaves open."""

    shape: ModelShape
    layout: WeightLayout
    workload: Workload
    platform: Platform
    draft: DraftPlan | None = None

    @property
    def variants(self) -> "tuple[Case, ...]":
        """Return the case with each possible drafter, the better one first."""
        return tuple(replace(self, draft=draft) for draft in self.platform.drafts(self))

    @property
    def num_mtp_layers(self) -> int:
        """Prediction layers that draft."""
        return 0 if self.draft is None else self.draft.num_mtp_layers

    @property
    def ffn_block(self) -> int:
        """Features of the feed-forward that exist at once."""
        return next(m.rows for m in self.layout.layers[0] if m.tensor.role is Role.GATE)

    @property
    def kv_dtype(self) -> str:
        """KV cache type, that of the workload or the one that suits its weights."""
        default = "float32" if self.workload.dtype == "float32" else "bfloat16"
        return self.workload.kv_dtype or default

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one position, in the layers that draft too."""
        return kv_bytes_per_token(self.shape, self.kv_dtype, self.num_mtp_layers)

    def reserved_parts(self, context: int) -> dict[str, int]:
        """The parts of the process's memory that are left to the program, where it asks for any."""
        workload, parts = self.workload, dict[str, int]()
        if workload.forms == "reserved":
            parts["forms"] = vocabulary_bytes(self.shape.vocab_size)
        if num_bytes := workload.reserve_bytes + workload.reserve_per_token * context:
            parts["reserved"] = num_bytes
        return parts
