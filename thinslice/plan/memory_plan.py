"""MemoryPlan: the sizes a planner chose, and the peak they imply, part by part. Frozen."""

from dataclasses import asdict, dataclass

from thinslice.units import format_bytes, gib


@dataclass(frozen=True)
class MemoryPlan:
    """All that is allocated follows from this.

    Attributes:
        budget_bytes: the most the process may hold, all causes.
        dtype: of weights, activations and KV cache.
        context: the longest prompt and completion together, in tokens.
        chunk: the most prompt tokens in flight at once (``max_num_batched_tokens``).
        max_num_seqs: sequences that may run at once.
        block_size: KV positions in a block.
        num_kv_blocks: blocks in the KV cache; at least one sequence of ``context`` fits.
        parts: name and bytes of each part of the peak.
    """

    budget_bytes: int
    dtype: str
    context: int
    chunk: int
    max_num_seqs: int
    block_size: int
    num_kv_blocks: int
    parts: tuple[tuple[str, int], ...]

    @property
    def peak_bytes(self) -> int:
        """The planned peak: the sum of all parts."""
        return sum(num_bytes for _, num_bytes in self.parts)

    @property
    def headroom_bytes(self) -> int:
        """What the budget leaves over."""
        return self.budget_bytes - self.peak_bytes

    def describe_parts(self) -> str:
        """The parts in GiB on one line: ``runtime 0.25, weights 0.25, ...``."""
        return ", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in self.parts)

    def summary(self) -> str:
        """One line for a log: what was chosen and what it takes."""
        return (
            f"{self.dtype}, context {self.context}, planned peak "
            f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        )

    def to_dict(self) -> dict[str, object]:
        """The plan for ``--json``."""
        return {**asdict(self), "parts": dict(self.parts), "peak_bytes": self.peak_bytes}
