"""thinslice run: answer one prompt."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from thinslice.cli.answer_view import PlainView
from thinslice.cli.console import note, note_all, print_json, progress_bars, silence_notes, write
from thinslice.cli.options import Load, Sampling
from thinslice.cli.prompt import PIPED, has_unread_input, read_prompt
from thinslice.config import EngineSettings, SamplingParams
from thinslice.constraint import Constraint
from thinslice.errors import ConfigError, RequestError
from thinslice.memory.meter import peak_rss_bytes
from thinslice.process import without_collections
from thinslice.store.names import advised_system_prompt
from thinslice.store.store import Store
from thinslice.units import counted, gib

if TYPE_CHECKING:
    from thinslice.engine.llm import LLM
    from thinslice.engine.request import Completion
    from thinslice.plan.memory_plan import Pool
    from thinslice.text.messages import Message


@dataclass(frozen=True)
class RunOptions:
    """What to do with the prompt and the answer.

    Attributes:
        system: System prompt. An empty one is given to the model as such; without this option the
            prompt that its makers recommend holds, or the model's own default.
        json_schema: Make the answer a JSON document of the JSON schema in this file; needs
            thinslice[grammar].
        raw: Continue the prompt as it stands, without the chat template.
        json: Print one JSON object instead of the text.
        file: Put the text of this file behind the prompt; may be given several times.
        prompts: Answer every prompt of this file: one a line, or of a .jsonl file one JSON value a
            line, a text or an object with "prompt", or with "messages" and perhaps "tools". Answers
            are lines of JSON, in the prompts' order, with the "id" of an object that has one.
        out: Append the answers to --prompts to this file, one by one. The same command goes on
            where an earlier one stopped.
        quiet: Print only the answer and errors, no notes and no progress.
    """

    system: str | None = None
    json_schema: Path | None = None
    raw: bool = False
    json: bool = False
    file: tuple[Path, ...] = ()
    prompts: Path | None = None
    out: Path | None = None
    quiet: bool = False


def run(
    model: str,
    /,
    *prompt_parts: str,
    options: Annotated[RunOptions, Parameter(name="*")] = RunOptions(),
    load: Load = EngineSettings(),  # noqa: B008
    sampling: Sampling = SamplingParams(),  # noqa: B008
) -> int:
    """Answer one prompt, streaming, or with --prompts all prompts of a file.

    Args:
        model: Name of the model.
        prompt_parts: The prompt. Without one, or with -, it is read from standard input.
            A prompt and - put what is piped in behind the prompt, as in:
            git diff | thinslice run smollm2 "Summarise:" -
    """
    silence_notes(options.quiet)
    sampling = of_schema(sampling, options.json_schema)
    prompt, piped, *more = (*prompt_parts, None, None)
    if any(more):
        raise ConfigError(f"unexpected: {prompt_parts[1]}; a text of several words goes in quotes")
    if options.raw and options.system is not None:
        raise ConfigError("--system cannot take effect with --raw: a raw prompt has no roles")
    if options.raw:
        sampling.check_plain()
    if options.prompts is not None:
        if prompt is not None or options.file:
            raise ConfigError("a prompt and --prompts cannot both be answered; give one of them")
        return _run_prompts(model, options, load, sampling)
    if options.out is not None:
        raise ConfigError("--out goes with --prompts; the answer to one prompt goes to a pipe")
    text = read_prompt(prompt, piped, options.file)
    llm = load_model(model, replace(load, max_num_seqs=1))
    if PIPED not in (prompt, piped) and has_unread_input():
        note("standard input is not read, as a prompt is given; - behind the prompt adds it")
    request: str | list[Message] = text
    if not options.raw:
        request = [{"role": "user", "content": text}]
        system = system_prompt(model, options.system)
        if system is not None:
            request = [{"role": "system", "content": system}, *request]
    view = PlainView()
    stream = llm.stream(request, sampling, None if options.json else view.read_prompt)
    try:
        for chunk in stream:
            if not options.json:
                view.add(chunk.kind, chunk.text)
    except KeyboardInterrupt:
        view.close()
        note("\nstopped")
        if options.json:
            stream.close()
            print_json(report(model, llm, stream.completion, sampling))
        raise
    finally:
        view.close()
    completion = stream.completion
    if options.json:
        print_json(report(model, llm, completion, sampling))
        return 0
    write("\n")
    warn_if_cut(completion)
    note(summary(llm, completion))
    return 0


def of_schema(sampling: SamplingParams, path: Path | None) -> SamplingParams:
    """The same for answers of the JSON schema in a file, if there is one.

    Errors: ConfigError for a file that cannot be read; RequestError for what is no schema.
    """
    if path is None:
        return sampling
    try:
        schema = read_prompt(None, None, (path,))
        return replace(sampling, constraint=Constraint.json_schema(schema))
    except RequestError as error:
        raise ConfigError(f"--json-schema {path}: {error}") from None


def _run_prompts(
    model: str,
    options: RunOptions,
    load: EngineSettings,
    sampling: SamplingParams,
) -> int:
    from thinslice.cli.batch import Batch, answer_all, answered_already
    from thinslice.cli.prompt_file import readable_again

    assert options.prompts is not None, "no file of prompts"
    if options.json:
        raise ConfigError("--json cannot take effect with --prompts: its answers are JSON already")
    system = None if options.raw else system_prompt(model, options.system)
    dtypes = (load.dtype, load.kv_dtype)
    with readable_again(options.prompts) as prompts:
        batch = Batch(model, prompts, options.out, system, options.raw, sampling, dtypes)
        batch.check()
        if (code := answered_already(batch)) is not None:
            return code
        llm = load_model(model, load)
        code = answer_all(llm, batch)
    note(f"peak {peaks(llm)}")
    return code


def system_prompt(model: str, given: str | None) -> str | None:
    """The system prompt that the user gives, else what the model's makers recommend."""
    if given is not None:
        return given
    advised = advised_system_prompt(model)
    if advised is not None:
        shown = repr(advised) if advised else "an empty one"
        note(f"system prompt: {shown}, as the makers of this model recommend; --system changes it")
    return advised


def load_model(model: str, settings: EngineSettings) -> "LLM":
    """Load a model with progress bars, fetching it first where it is not in the store."""
    # A wrong name is told before what takes long is imported.
    Store().check_name(model)
    with without_collections(stays=True):
        from thinslice.engine.llm import LLM

    with progress_bars() as progress:
        llm = LLM(model, progress=progress, **asdict(settings))
    note_all(llm.notes)
    return llm


def summary(llm: "LLM", completion: "Completion") -> str:
    """Tokens, speed, and the measured peak beside the budget, on one line."""
    count, expected, drafts = len(completion.token_ids), "", ""
    if completion.is_thought_cut:
        drafts = f"thought led to its end at {completion.num_reasoning} tokens, "
    if count < 2:  # The speed is that of what follows the first token.
        return f"{counted(count, 'token')}, peak {peaks(llm)}"
    predicted = predicted_tokens_per_s(llm, completion)
    if predicted is not None:
        drafting = "" if llm.plan.draft is None else " without drafts"
        measured = ", measured on a busy machine" if llm.is_prediction_busy else ""
        position = round(_half_way(completion))
        expected = f" ({predicted:.1f} predicted{drafting} at {position} tokens{measured})"
    if completion.num_drafted:
        drafts += f"{completion.num_accepted} of {completion.num_drafted} drafts accepted, "
    return (
        f"{count} tokens, {completion.decode_tokens_per_s:.1f} tokens/s{expected}, {drafts}"
        f"peak {peaks(llm)}"
    )


def predicted_tokens_per_s(llm: "LLM", completion: "Completion") -> float | None:
    """The prediction for a completion of this length behind this prompt; None without one."""
    if llm.prediction is None:
        return None
    return 1 / llm.prediction.token.seconds(_half_way(completion))


def _half_way(completion: "Completion") -> float:
    """Tokens in the context when half of a completion is there."""
    return len(completion.prompt_token_ids) + len(completion.token_ids) / 2


def peaks(llm: "LLM") -> str:
    """The measured peak beside the budget and the plan; on a device its own, then the host's."""
    of_host = _peak(peak_rss_bytes(), llm.plan.host)
    if llm.device is None:
        return of_host
    of_device = _peak(llm.device.peak_bytes(), llm.plan.pools[0])
    return f"{of_device} on {llm.device.name}, {of_host} on the host"


def _peak(peak_bytes: int, pool: "Pool") -> str:
    return f"{gib(peak_bytes)} of {gib(pool.budget_bytes)} GiB ({gib(pool.peak_bytes)} planned)"


def report(
    model: str, llm: "LLM", completion: "Completion", sampling: SamplingParams
) -> dict[str, Any]:
    """The fields of ``run --json``.

    Args:
        sampling: what the user gave.
    """
    used = sampling.resolved(llm.sampling)
    return {
        "model": model,
        "text": completion.text,
        "reasoning": completion.reasoning,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt_token_ids),
        "completion_tokens": len(completion.token_ids),
        "reasoning_tokens": completion.num_reasoning,
        "is_thought_cut": completion.is_thought_cut,
        "drafted_tokens": completion.num_drafted,
        "accepted_tokens": completion.num_accepted,
        "seed": completion.seed,
        "sampling": {
            name: {"value": getattr(used, name), "from": source}
            for name, source in sampling.sources(llm.sampling).items()
        },
        "prefill_s": completion.prefill_s,
        "decode_s": completion.decode_s,
        "decode_tokens_per_s": completion.decode_tokens_per_s,
        "predicted_tokens_per_s": predicted_tokens_per_s(llm, completion),
        "peak_bytes": peak_rss_bytes(),
        "device_peak_bytes": llm.device and llm.device.peak_bytes(),
        "plan": llm.plan.to_dict(),
        "prediction": llm.prediction and asdict(llm.prediction),
    }


def warn_if_cut(completion: "Completion") -> None:
    """Say so where an answer ended because it was as long as it might be."""
    if completion.finish_reason != "length":
        return
    if completion.reasoning and not completion.text:
        told = "no answer yet: the completion ended while reasoning"
        note(f"{told}; raise --max-tokens or --context, or set --max-thinking-tokens")
    else:
        note("the answer reached its maximum length; raise --max-tokens or --context for more")
