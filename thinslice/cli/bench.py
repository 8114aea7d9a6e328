"""thinslice bench: how fast a model runs within a budget, and what it takes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from thinslice.cli.console import plain_table, print_json, print_table, silence_notes
from thinslice.cli.options import Json, Load, Quiet
from thinslice.cli.run import load_model, peaks
from thinslice.config import EngineSettings
from thinslice.errors import BudgetError, ConfigError
from thinslice.memory.meter import peak_rss_bytes
from thinslice.units import format_bytes

if TYPE_CHECKING:
    from thinslice.engine.benchmark import BenchmarkResult
    from thinslice.engine.draft_length import DraftReport
    from thinslice.engine.llm import LLM


@dataclass(frozen=True)
class BenchOptions:
    """What is run.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        completion_tokens: Tokens of each completion.
        sequences: Prompts that run at once.
    """

    prompt_tokens: int = 512
    completion_tokens: int = 64
    sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "completion_tokens", "sequences"):
            if getattr(self, name) < 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is {getattr(self, name)}; expected 1 or more")

    @property
    def context(self) -> int:
        """Tokens of a prompt and its completion."""
        return self.prompt_tokens + self.completion_tokens


def bench(
    model: str,
    /,
    *,
    options: Annotated[BenchOptions, Parameter(name="*")] = BenchOptions(),
    load: Load = EngineSettings(),  # noqa: B008
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prefill, decode and memory on prompts of random tokens.

    Without --context, it is what a prompt and its completion take.

    Args:
        model: Name of the model.
        as_json: Print one JSON object instead of the table.
        quiet: Print only the table and errors, no notes and no progress.
    """
    silence_notes(quiet)
    settings = replace(load, max_num_seqs=options.sequences)
    if load.context is None:
        with _context_in_tokens(options):
            llm = load_model(model, replace(settings, context=options.context))
    else:
        llm = load_model(model, settings)
    from thinslice.engine.benchmark import benchmark

    result = benchmark(llm.engine, **asdict(options))
    if as_json:
        print_json(_report(model, options, llm, result))
    else:
        _print_table(llm, result)


@contextmanager
def _context_in_tokens(options: BenchOptions) -> Iterator[None]:
    """Have errors about the context, which nobody named, name the tokens that make it."""

    def tokens(found: re.Match[str]) -> str:
        context, completion = int(found[1]), options.completion_tokens
        if context == options.context:
            given = f"--prompt-tokens {options.prompt_tokens} and --completion-tokens {completion}"
            return f"{given} ({context} together)"
        if context > completion:
            return f"--prompt-tokens {context - completion}"
        return f"--prompt-tokens 1 --completion-tokens {context - 1}"

    try:
        yield
    except (ConfigError, BudgetError) as error:
        text = error.with_options or str(error)
        told = re.sub(r"--context (\d+)", tokens, text)
        if told == text:
            raise
        raise type(error)(told) from error


def _report(
    model: str, options: BenchOptions, llm: "LLM", result: "BenchmarkResult"
) -> dict[str, Any]:
    """The fields of ``bench --json``, as docs/benchmarks.md tells them."""
    return {
        "model": model,
        **asdict(options),
        **asdict(result),
        "drafting": {name: asdict(one) for name, one in _drafting(llm).items()},
        "peak_bytes": peak_rss_bytes(),
        "device_peak_bytes": llm.device and llm.device.peak_bytes(),
        "planned_bytes": llm.plan.peak_bytes,
        "budget_bytes": llm.plan.budget_bytes,
        "plan": llm.plan.to_dict(),
    }


def _drafting(llm: "LLM") -> "dict[str, DraftReport]":
    drafting = llm.engine.drafting
    return {} if drafting is None else drafting.reports()


def _print_table(llm: "LLM", result: "BenchmarkResult") -> None:
    plan = llm.plan
    table = plain_table()
    table.add_row("prefill", f"{result.prefill_tokens_per_s:.1f} tokens/s")
    table.add_row("decode", f"{result.decode_tokens_per_s:.1f} tokens/s")
    first, last = result.time_to_first_token_s, result.last_time_to_first_token_s
    table.add_row("first token", f"{first:.3f} s (median), {last:.3f} s (last)")
    table.add_row("tokens per sweep", f"{result.tokens_per_sweep:.2f}")
    table.add_row("accepted per sweep", f"{result.accepted_per_sweep:.2f}")
    table.add_row("drafts", f"{result.accepted_tokens} of {result.drafted_tokens} accepted")
    table.add_row("beside the model", f"{result.overhead_s * 1e3:.2f} ms per step")
    if plan.streaming is not None:
        streamed = format_bytes(round(result.streamed_bytes_per_sweep))
        table.add_row("streamed per sweep", streamed)
        table.add_row("waiting for slices", f"{result.slice_wait_share:.0%} of the model's time")
    table.add_row("preemptions", str(result.preemptions))
    table.add_row("peak", peaks(llm))
    table.add_row("weights", f"{plan.dtype}, {plan.describe_weights()}")
    print_table(table)
