"""What a plan is made for: a shape, its weights, a workload, and what the process holds already."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from thinslice.plan.cost import Computation, kv_bytes_per_token
from thinslice.plan.memory_plan import DraftPlan
from thinslice.plan.model_shape import ModelShape
from thinslice.plan.tensors import Role
from thinslice.plan.weight_layout import FLOAT_BYTES, WeightLayout


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
        tokenizer_bytes: of what the process holds already, what loading the model's tokenizer
            added; no more than all of it.
        draft: who drafts: auto, ngram, mtp or off.
        draft_length: the most drafts for a sequence in a step.
        mtp_hidden: what a prediction layer takes of the model; see DraftPlan.
    """

    context: int | None = None
    max_num_seqs: int = 1
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    num_threads: int = 2
    can_change_dtype: bool = True
    packing_bytes: Callable[[str], int | None] = _runs_as_it_is
    most_memory: int | None = None
    tokenizer_bytes: int = 0
    draft: str = "off"
    draft_length: int = 8
    mtp_hidden: str = "pre-norm"


def held_parts(held_bytes: int, workload: Workload) -> dict[str, int]:
    """What the process holds before the model is loaded, cut in two: interpreter, libraries and
    whatever else there is, and the model's tokenizer."""
    tokenizer_bytes = workload.tokenizer_bytes
    return {"runtime": held_bytes - tokenizer_bytes, "tokenizer": tokenizer_bytes}


@dataclass(frozen=True)
class Tokens:
    """Positions of a sequence, tokens in flight, and how many of them a layer takes at a time."""

    context: int
    chunk: int
    layer_rows: int


@dataclass(frozen=True)
class Case:
    """What a plan is made for; ``draft`` is one of those that the workload leaves open."""

    shape: ModelShape
    layout: WeightLayout
    workload: Workload
    runtime_bytes: int
    draft: DraftPlan | None = None

    @property
    def variants(self) -> "tuple[Case, ...]":
        """Return the case with each possible drafter, the better one first."""
        wanted, length = self.workload.draft, self.workload.draft_length
        if wanted == "off":
            return (self,)
        hidden = self.workload.mtp_hidden
        count = self.shape.num_nextn_predict_layers
        drafts = [DraftPlan(wanted != "mtp", count * (wanted == "mtp"), length, mtp_hidden=hidden)]
        if wanted == "auto" and self.layout.prediction:
            drafts.insert(0, replace(drafts[0], num_mtp_layers=count))
        return tuple(replace(self, draft=draft) for draft in drafts)

    @property
    def num_mtp_layers(self) -> int:
        """Prediction layers that draft."""
        return 0 if self.draft is None else self.draft.num_mtp_layers

    @property
    def how(self) -> Computation:
        """How a forward pass is computed, as far as it matters to its memory."""
        block = next(m.rows for m in self.layout.layers[0] if m.tensor.role is Role.GATE)
        return Computation(
            ffn_block=block,
            is_packed=self.workload.dtype not in FLOAT_BYTES,
            num_threads=self.workload.num_threads,
        )

    @property
    def kv_dtype(self) -> str:
        """KV cache type, that of the workload or the one that suits its weights."""
        default = "float32" if self.workload.dtype == "float32" else "bfloat16"
        return self.workload.kv_dtype or default

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one position, in the layers that draft too."""
        return kv_bytes_per_token(self.shape, self.kv_dtype, self.num_mtp_layers)

    @property
    def packing_floor_bytes(self) -> int:
        """The least budget that the files are packed in before they run; 0 where they need not."""
        beyond = self.workload.packing_bytes(self.workload.dtype)
        return 0 if beyond is None else self.runtime_bytes + beyond
