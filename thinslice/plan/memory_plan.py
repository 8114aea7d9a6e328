"""MemoryPlan: the sizes a planner chose, and the peak they imply, part by part. Frozen."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from thinslice.units import format_bytes

# The parts of a plan, or of its host's side, that the process holds before the model is loaded.
HELD_PARTS = ("runtime", "tokenizer")


@dataclass(frozen=True)
class Pool:
    """One memory that a plan takes bytes of, with a budget of its own.

    Attributes:
        option: the option that names its budget.
        budget_bytes: the most that may be held there, all causes.
        parts: name and bytes of each part of the peak, in the order they are shown.
        owner: whose it is, where there are two: ``of cuda``, ``beside cuda``.
    """

    option: str
    budget_bytes: int
    parts: tuple[tuple[str, int], ...] = ()
    owner: str = ""

    @property
    def peak_bytes(self) -> int:
        """The planned peak: the sum of all parts."""
        return sum(num_bytes for _, num_bytes in self.parts)

    @property
    def headroom_bytes(self) -> int:
        """What the budget leaves over; negative where the peak does not fit."""
        return self.budget_bytes - self.peak_bytes

    def part(self, name: str) -> int:
        """Bytes of a part; 0 where there is none of the name."""
        return dict(self.parts).get(name, 0)

    def with_more(self, extra: Mapping[str, int]) -> "Pool":
        """Add bytes to parts, which are put at the end where they are new."""
        parts = dict(self.parts)
        for name, num_bytes in extra.items():
            parts[name] = parts.get(name, 0) + num_bytes
        return replace(self, parts=tuple(parts.items()))


@dataclass(frozen=True)
class StreamingPlan:
    """How weights that do not fit are read in at each use.

    Attributes:
        slice_bytes: the most bytes in a slice, on disk or in memory.
        num_slices: slices in a sweep.
        num_pinned: slices of those that stay resident.
        num_last_pinned: of the pinned ones, those at the end of the sweep: the head's, where a
            prediction layer drafts and needs it between sweeps. The others are spread evenly.
        num_buffers, buffer_bytes: the ring that slices are read into.
        layer_rows: the most rows that a layer takes at a time. A step of more then goes through
            layer by layer: the residual stream of all rows is kept, and a layer's streamed slices
            are held until the last rows have passed. None takes all rows of a step at once.
    """

    slice_bytes: int
    num_slices: int
    num_pinned: int
    num_buffers: int
    buffer_bytes: int
    num_last_pinned: int = 0
    layer_rows: int | None = None

    def pinned(self) -> list[int]:
        """The slices that stay resident, by their place in the sweep.

        Pinned and streamed slices take turns, so that reading goes on while pinned ones compute.
        """
        count = self.num_pinned - self.num_last_pinned
        first_last = self.num_slices - self.num_last_pinned
        return [*spread(count, first_last), *range(first_last, self.num_slices)]


def spread(count: int, total: int) -> list[int]:
    """``count`` places of ``total``, evenly."""
    return [-(-turn * total // count) - 1 for turn in range(1, count + 1)]


@dataclass(frozen=True)
class DevicePlan:
    """What a plan for an accelerator keeps on the host for it.

    Attributes:
        name: of the device, as a user names it.
        num_locked: of the slices that are streamed, those that lie in page-locked host memory,
            read once; the others are read from disk at each use.
        num_staging, staging_bytes: page-locked buffers that these are read into; 0 where all lie in
            memory.
        num_spilled_blocks: room in page-locked memory for blocks of the KV cache that the device
            has none for.
    """

    name: str
    num_locked: int = 0
    num_staging: int = 0
    staging_bytes: int = 0
    num_spilled_blocks: int = 0

    def locked(self, streamed: list[int]) -> list[int]:
        """Of the slices that are streamed, by their places in the sweep, those in host memory;
        they take turns with those on disk."""
        return [streamed[turn] for turn in spread(self.num_locked, len(streamed))]


@dataclass(frozen=True)
class DraftPlan:
    """Who drafts.

    Attributes:
        uses_ngram: n-grams of the text so far.
        num_mtp_layers: prediction layers of the model that draft: all it has, or none. They are
            loaded then, and each has a KV cache.
        length: the most drafts for a sequence in a step.
        mtp_hidden: what the first layer takes of the model: its last hidden state ``pre-norm`` or
            ``post-norm``.
    """

    uses_ngram: bool
    num_mtp_layers: int
    length: int
    mtp_hidden: str = "pre-norm"

    def describe(self) -> str:
        """``n-grams, then the prediction layer, at most 8 tokens``, or one of the two."""
        count = self.num_mtp_layers
        layers = "the prediction layer" if count == 1 else f"{count} prediction layers"
        who = {"n-grams": self.uses_ngram, layers: count > 0}
        names = ", then ".join(name for name, is_used in who.items() if is_used)
        return f"{names}, at most {self.length} tokens"


@dataclass(frozen=True)
class MemoryPlan:
    """All that is allocated follows from this.

    Attributes:
        pools: the memory that is computed in, with weights and KV cache, first; that of the process
            last. They are one and the same where the processor computes.
        dtype: weight type: bfloat16, float32, int8 or int4.
        kv_dtype: of the KV cache: bfloat16, float32 or int8.
        context: the longest prompt and completion together, in tokens.
        chunk: the most tokens in flight at once (``max_num_batched_tokens``).
        max_num_seqs: sequences that may run at once.
        block_size: KV positions in a block.
        num_kv_blocks: blocks in the KV cache; at least one sequence of ``context`` fits.
        streaming: None where all weights are resident.
        draft: None where nothing is drafted.
        device: None where the processor computes.
    """

    pools: tuple[Pool, ...]
    dtype: str
    kv_dtype: str
    context: int
    chunk: int
    max_num_seqs: int
    block_size: int
    num_kv_blocks: int
    streaming: StreamingPlan | None = None
    draft: DraftPlan | None = None
    device: DevicePlan | None = None

    @property
    def host(self) -> Pool:
        """The memory of the process."""
        return self.pools[-1]

    @property
    def budget_bytes(self) -> int:
        """The budget of the memory that is computed in."""
        return self.pools[0].budget_bytes

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of each part of the peak there."""
        return self.pools[0].parts

    @property
    def peak_bytes(self) -> int:
        """The planned peak there."""
        return self.pools[0].peak_bytes

    @property
    def headroom_bytes(self) -> int:
        """What the budget there leaves over."""
        return self.pools[0].headroom_bytes

    @property
    def fits(self) -> bool:
        """Whether every peak fits its budget."""
        return all(pool.headroom_bytes >= 0 for pool in self.pools)

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of a block of the KV cache."""
        return self.pools[0].part("kv cache") // self.num_kv_blocks

    def with_more(self, place: int, extra: Mapping[str, int]) -> "MemoryPlan":
        """Add bytes to the parts of the pool at a place."""
        pools = list(self.pools)
        pools[place] = pools[place].with_more(extra)
        return replace(self, pools=tuple(pools))

    @property
    def num_mtp_layers(self) -> int:
        """Prediction layers that run beside the model."""
        return 0 if self.draft is None else self.draft.num_mtp_layers

    def describe_weights(self) -> str:
        """Describe where the weights live: ``resident``, or how many slices are streamed."""
        if self.streaming is None:
            return "resident"
        num_streamed = self.streaming.num_slices - self.streaming.num_pinned
        text = f"{num_streamed} of {self.streaming.num_slices} slices streamed"
        if self.device is None:
            return text
        return f"{text}, {self.device.num_locked} of them from host memory"

    def describe_chunk(self) -> str:
        """Tokens in flight, and how many of them a layer takes at a time where that is less."""
        layer_rows = None if self.streaming is None else self.streaming.layer_rows
        by_layer = "" if layer_rows is None else f", through each layer {layer_rows} at a time"
        return f"{self.chunk} tokens{by_layer}"

    def describe_drafting(self) -> str:
        """Who drafts, or ``off``."""
        return "off" if self.draft is None else self.draft.describe()

    def summary(self) -> str:
        """One line for a log: what was chosen and what it takes."""
        return (
            f"{self.dtype}, weights {self.describe_weights()}, context {self.context}, "
            f"planned peak {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        )

    def to_dict(self) -> dict[str, object]:
        """The plan for ``--json``."""
        sizes = {name: value for name, value in asdict(self).items() if name != "pools"}
        later = {name: sizes.pop(name) for name in ("streaming", "draft", "device")}
        if self.device is not None:
            host = {"host_budget_bytes": self.host.budget_bytes, "host_parts": self.host.parts}
            later["device"] = {"name": self.device.name, **host, **later["device"]}
        record = {"budget_bytes": self.budget_bytes, **sizes, "parts": dict(self.parts), **later}
        return {**record, "peak_bytes": self.peak_bytes}
