"""What plan shows of one plan: its parts, its sizes and its speeds."""

from typing import TYPE_CHECKING

from rich.table import Table

from thinslice.cli.console import out, plain_table
from thinslice.units import counted, format_bytes, size_option

if TYPE_CHECKING:
    from thinslice.plan.memory_plan import MemoryPlan, Pool
    from thinslice.plan.planner import Residency
    from thinslice.plan.predict import Prediction

# Columns, and those of a part's name and size beside it.
_LONGEST_BAR, _BESIDE_BAR = 32, 28


def parts_table(title: str, pool: "Pool") -> Table:
    """The parts of one pool of memory, and what they leave of its budget."""
    table = plain_table(title, "SIZE", "SHARE OF THE BUDGET")
    for column in table.columns:
        column.no_wrap = True
    table.columns[-1].overflow = "crop"
    width = max(min(_LONGEST_BAR, out.width - _BESIDE_BAR), 1)
    for name, num_bytes in [*pool.parts, ("headroom", pool.headroom_bytes)]:
        bar = "█" * round(width * num_bytes / pool.budget_bytes)
        table.add_row(name, format_bytes(num_bytes), bar)
    table.add_row("budget", format_bytes(pool.budget_bytes), "")
    return table


def sizes_table(
    chosen: "MemoryPlan",
    speed: "Prediction | None",
    resident: "Residency | None",
    *,
    is_asked: bool,
) -> Table:
    """What was chosen, and how fast that is."""
    table = plain_table()
    table.add_row("dtype", f"{chosen.dtype}, KV cache {chosen.kv_dtype}")
    table.add_row("weights", chosen.describe_weights())
    if resident is not None:
        table.add_row("resident", _resident(resident))
    table.add_row("context", f"{chosen.context} tokens, {_why_context(chosen, is_asked)}")
    table.add_row("chunk", chosen.describe_chunk())
    table.add_row("sequences", f"{chosen.max_num_seqs}, {chosen.num_kv_blocks} KV blocks in all")
    table.add_row("drafting", chosen.describe_drafting())
    if speed is not None:
        decode = f"{rate(speed.decode_tokens_per_s)} at {speed.decode_position} tokens"
        table.add_row("decode", f"{decode}, bound by {speed.bound}")
        prompt = f"for a prompt of {chosen.chunk} tokens"
        table.add_row("prefill", f"{rate(speed.prefill_tokens_per_s)} {prompt}")
    return table


def thought(chosen: "MemoryPlan", speed: "Prediction", count: int) -> str:
    """What the longest thought of a budget takes."""
    room = chosen.context - chosen.chunk
    if count > room:
        return f"{counted(count, 'token')} do not fit the context behind a prompt; {room} do"
    seconds = thought_s(chosen, speed, count)
    return f"{counted(count, 'token')} take {seconds:.3g} s behind a prompt of {chosen.chunk}"


def thought_s(chosen: "MemoryPlan", speed: "Prediction", count: int) -> float:
    """Seconds of a thought of so many tokens behind a prompt of one chunk."""
    return speed.token.run_seconds(chosen.chunk, count)


def _resident(resident: "Residency") -> str:
    """Which budgets and contexts keep the weights in memory."""
    memory = f"from --memory {size_option(resident.memory_bytes)}"
    at = f"at {resident.memory_context} tokens"
    if resident.context is None:
        return f"{memory} {at}"
    return f"{memory} {at}; in this memory up to --context {resident.context}"


def _why_context(chosen: "MemoryPlan", is_asked: bool) -> str:
    if is_asked:
        return "as asked"
    if chosen.streaming is None:
        return "the longest beside resident weights"
    return "the longest that leaves half of the room to streamed weights, or the least useful one"


def rate(tokens_per_s: float) -> str:
    """Tokens a second, or seconds a token where that is the larger number."""
    if tokens_per_s >= 10:
        return f"{tokens_per_s:.0f} tokens/s"
    if tokens_per_s >= 1:
        return f"{tokens_per_s:.1f} tokens/s"
    return f"{1 / tokens_per_s:.1f} s/token"
