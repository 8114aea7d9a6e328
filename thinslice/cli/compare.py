"""thinslice compare: the quality of one version of a model measured against another."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from rich.table import Table

from thinslice.cli.console import (
    note,
    note_all,
    plain_table,
    print_json,
    print_table,
    progress_bars,
)
from thinslice.config import Dtype, KvDtype
from thinslice.errors import ConfigError, RequestError
from thinslice.memory.meter import peak_rss_bytes
from thinslice.units import MIB, counted, format_bytes, gib

if TYPE_CHECKING:
    from thinslice.engine.compare import ModelPair, Windows
    from thinslice.engine.divergence import Divergence, Estimate

# Half a million tokens: no processor gets through them in a day's work.
_LARGEST_TEXT = 2 * MIB


@dataclass(frozen=True)
class CompareOptions:
    """What is scored, and within which memory.

    Attributes:
        text: File with the text, UTF-8.
        tokens: Use only the first so many tokens of the text.
        context: Tokens of a window. The text is cut into windows that know nothing of each other,
            the last one as short as it comes out.
        memory: The budget for both models together, as 4GiB or 4GB. Without it, a share of what is
            free, as of run.
        dtype_a: Weight type of A, as --dtype of run.
        dtype_b: Weight type of B.
        kv_dtype_a: KV cache type of A, as --kv-dtype of run.
        kv_dtype_b: KV cache type of B.
        offline: Use no network: only models that are here already are found.
        json: Print one JSON object instead of the table.
    """

    text: Path
    tokens: int | None = None
    context: int = 512
    memory: str | None = None
    dtype_a: Dtype = "auto"
    dtype_b: Dtype = "auto"
    kv_dtype_a: KvDtype = "auto"
    kv_dtype_b: KvDtype = "auto"
    offline: bool = False
    json: bool = False


Options = Annotated[CompareOptions, Parameter(name="*", group=Group("Comparison", sort_key=1))]


def compare(a: str, b: str, /, *, options: Options) -> None:
    """Measure one version of a model against another on a text.

    Both models read the same text, and at each token but the first of a window what they expect
    there is compared: the KL divergence of B's distribution over the vocabulary from A's,
    KL(A||B), in nats; whether both find the same token likeliest; and how likely each finds the
    token that stands there, of which the perplexities are made. Where the model begins a prompt
    with BOS, so does every window, and its first token is scored too. These are the measures of
    llama.cpp's perplexity tool with --kl-divergence, which scores the second half of each window
    only and leaves out a last window that is not full. Standard errors follow the ±.

    Both models are loaded at once, each with half of the budget and what the other leaves.

    Args:
        a: Name of the reference.
        b: Name of the model that is measured: another version of A, with the same vocabulary.
    """
    from thinslice.engine.compare import CompareSettings, load_pair

    settings = CompareSettings(
        a,
        b,
        memory=options.memory,
        context=options.context,
        num_tokens=options.tokens,
        dtype_a=options.dtype_a,
        dtype_b=options.dtype_b,
        kv_dtype_a=options.kv_dtype_a,
        kv_dtype_b=options.kv_dtype_b,
        offline=options.offline,
    )
    text = _read_text(options.text)
    with progress_bars() as progress:
        pair, windows = load_pair(settings, text, progress)
    note_all(pair.notes)
    try:
        with progress_bars("tokens") as progress:
            divergence = pair.compare(windows, progress)
    finally:
        pair.close()
    if options.json:
        print_json(_report(options, (a, b), pair, windows, divergence))
        return
    print_table(_models_table((a, b), pair, divergence))
    print_table(_divergence_table(divergence))
    note(_summary(pair, windows))


def _read_text(path: Path) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > _LARGEST_TEXT:
            raise RequestError(
                f"{path} has {format_bytes(num_bytes)}; at most {format_bytes(_LARGEST_TEXT)} of "
                "text are compared"
            )
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8: see byte {error.start}") from None


def _models_table(names: tuple[str, str], pair: "ModelPair", divergence: "Divergence") -> Table:
    table = plain_table("", "MODEL", "DTYPE", "WEIGHTS", "PERPLEXITY")
    perplexities = (divergence.perplexity_a, divergence.perplexity_b)
    rows = zip("AB", names, (pair.a.plan, pair.b.plan), perplexities, strict=True)
    for letter, name, chosen, perplexity in rows:
        weights = chosen.describe_weights()
        table.add_row(letter, name, chosen.dtype, weights, _with_error(perplexity, 4))
    return table


def _divergence_table(divergence: "Divergence") -> Table:
    table = plain_table()
    table.add_row("KL(A||B) per token, mean", f"{_with_error(divergence.kl, 6)} nats")
    table.add_row("  median", f"{divergence.kl_median:.6f}")
    table.add_row("  99th percentile", f"{divergence.kl_99:.6f}")
    table.add_row("  largest", f"{divergence.kl_max:.6f}")
    table.add_row("same likeliest token", f"{_with_error(divergence.same_top, 3, 100)} %")
    table.add_row("ln of perplexity B / A", _with_error(divergence.log_ratio, 6))
    return table


def _with_error(estimate: "Estimate", digits: int, scale: float = 1) -> str:
    mean, error = scale * estimate.mean, scale * estimate.standard_error
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def _summary(pair: "ModelPair", windows: "Windows") -> str:
    """How much of the text was used, and the measured peak beside the budget, on one line."""
    return (
        f"{windows.num_scored} tokens scored: {windows.num_used} of the text's "
        f"{windows.num_text_tokens} used, in {counted(len(windows.token_ids), 'window')} of "
        f"{windows.context}; peak {gib(peak_rss_bytes())} of {gib(pair.budget_bytes)} GiB"
    )


def _report(
    options: CompareOptions,
    names: tuple[str, str],
    pair: "ModelPair",
    windows: "Windows",
    divergence: "Divergence",
) -> dict[str, Any]:
    """The fields of ``compare --json``: every estimate as mean and standard_error."""
    return {
        "a": {"model": names[0], "plan": pair.a.plan.to_dict()},
        "b": {"model": names[1], "plan": pair.b.plan.to_dict()},
        "text": str(options.text),
        "text_tokens": windows.num_text_tokens,
        "used_tokens": windows.num_used,
        "windows": len(windows.token_ids),
        "context": windows.context,
        **asdict(divergence),
        "budget_bytes": pair.budget_bytes,
        "peak_bytes": peak_rss_bytes(),
    }
