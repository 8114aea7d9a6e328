"""thinslice run --prompts: a file of prompts, answered many at once into a file of answers."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from thinslice.cli.console import ReaderGoneError, note, progress_bars, unwritten
from thinslice.cli.prompt_file import PromptFile, opened
from thinslice.config import SamplingParams
from thinslice.errors import ConfigError, RequestError, ThinsliceError, plain, shown
from thinslice.store.store import Store
from thinslice.text.messages import Conversation
from thinslice.units import MIB

if TYPE_CHECKING:
    from thinslice.engine.in_order import Prompt
    from thinslice.engine.llm import LLM
    from thinslice.engine.request import Completion

# An answer's line is at most a context of text, its JSON escapes included.
_LARGEST_ANSWER = 64 * MIB
# Fields of a line: one of the first, and all that may stand beside it.
_PROMPTS = {"prompt", "messages"}
_FIELDS = {*_PROMPTS, "tools", "id"}
_MOST_NAMED = 10


@dataclass(frozen=True)
class Batch:
    """What is asked of every prompt of a file.

    Attributes:
        prompts: one prompt a line; of a .jsonl file, a text, or an object with ``prompt`` or
            ``messages``, and then ``tools``. The answer to an object with an ``id`` has it too.
        out: the file that answers are appended to; None for standard output.
        system: the system prompt of every conversation that has none; None for none.
        raw: continue each prompt as it stands.
        dtypes: what weights and KV cache were asked to be, on which answers hang too.
    """

    model: str
    prompts: PromptFile
    out: Path | None
    system: str | None
    raw: bool
    sampling: SamplingParams
    dtypes: tuple[str, str]

    def check(self) -> None:
        """Refuse files that cannot be used, before a model is loaded.

        Errors: ConfigError; RequestError for a file without a prompt.
        """
        if self.prompts.num_lines() == 0:
            raise RequestError(f"{self.prompts.path} holds no prompt")
        if self.out is not None and self.out.exists() and self.out.samefile(self.prompts.path):
            raise ConfigError(f"--out {self.out} is the file of the prompts; name another one")
        if self.out is not None and self.out.exists() and not self.out.is_file():
            raise ConfigError(
                f"--out {self.out} is not a file, from which answers could be read again; without "
                "--out they go to standard output"
            )
        with _out_file(self.out):
            pass


def answered_already(batch: Batch) -> int | None:
    """The exit code where all answers are there, told without loading the model; else None.

    A last line that was cut off is taken back, as ``answer_all`` does.

    Errors: as ``answer_all``.
    """
    from thinslice.checkpoint.open import open_checkpoint

    if batch.out is None or batch.out.stat().st_size == 0:
        return None
    try:
        advised = open_checkpoint(Store().resolve(batch.model)).sampling
    except ThinsliceError:
        return None  # loading it tells what is wrong
    batch = replace(batch, sampling=batch.sampling.resolved(advised))
    with _out_file(batch.out) as out:
        done, num_failed = _count_done(out, batch)
    if done < batch.prompts.num_lines():
        return None
    note(f"all answers are in {batch.out} already")
    return _exit_code(num_failed, done)


def answer_all(llm: "LLM", batch: Batch) -> int:
    """Answer every prompt of the file, and go on where an earlier run stopped.

    Each answer is one line of JSON, written and synced before the next. Returns the exit code: that
    of a bad prompt where one could not be answered.

    Memory: twice the batch's prompts and answers, whatever the file's length.
    Errors: ConfigError for files that cannot be read or written, and for an ``out`` with answers to
    other prompts or made with other settings.
    """
    from thinslice.engine.in_order import complete_in_order

    # An answer hangs on what the model's files advise too, and so does its digest.
    batch = replace(batch, sampling=batch.sampling.resolved(llm.sampling))
    total = batch.prompts.num_lines()
    with _out_file(batch.out) as out:
        done, num_failed = (0, 0) if batch.out is None else _count_done(out, batch)
        if done:
            note(f"{done} of {total} answers are in {batch.out} already")
        heads: list[dict[str, Any]] = []

        def prompts() -> "Iterator[Prompt | RequestError]":
            for line in islice(batch.prompts.lines(), done, None):
                asked = _asked_by(line, batch.prompts.is_json)
                heads.append({"digest": _digest(line, batch), **_id_of(asked)})
                yield _prompt_of(asked, batch)

        with progress_bars("answers") as progress:
            for answer in complete_in_order(llm, prompts(), batch.sampling):
                record = {"index": done, **heads.pop(0), **_record(answer)}
                num_failed += "error" in record
                _append(out, record)
                done += 1
                progress("answering", done, total)
    return _exit_code(num_failed, total)


def _exit_code(num_failed: int, total: int) -> int:
    if num_failed == 0:
        return 0
    note(f"{num_failed} of {total} prompts could not be answered; their lines say why")
    return RequestError.exit_code


def _record(answer: "Completion | RequestError") -> dict[str, Any]:
    if isinstance(answer, RequestError):
        return {"error": str(answer)}
    record: dict[str, Any] = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.prompt_token_ids),
        "completion_tokens": len(answer.token_ids),
        "reasoning_tokens": answer.num_reasoning,
        "is_thought_cut": answer.is_thought_cut,
        "seed": answer.seed,
    }
    if answer.tool_calls:
        record["tool_calls"] = [asdict(one) for one in answer.tool_calls]
    return record if answer.error is None else {**record, "error": str(answer.error)}


def _asked_by(line: bytes, is_json: bool) -> Any:
    """The value that a line holds; a RequestError where it holds none."""
    try:
        text = line.decode().rstrip("\r\n")
        return json.loads(text) if is_json else text
    except UnicodeDecodeError:
        return RequestError("the line is not UTF-8")
    except (ValueError, RecursionError):
        return RequestError("the line is not JSON")


def _id_of(asked: Any) -> dict[str, Any]:
    """The field of a line that its answer has too."""
    return {"id": asked["id"]} if isinstance(asked, dict) and _has_good_id(asked) else {}


def _has_good_id(asked: dict[str, Any]) -> bool:
    return isinstance(asked.get("id"), str | int)


def _prompt_of(asked: Any, batch: Batch) -> "Prompt | RequestError":
    """The prompt that the value of a line holds, or why it holds none."""
    if isinstance(asked, RequestError):
        return asked
    tools: Any = ()
    if isinstance(asked, dict) and not _PROMPTS.isdisjoint(asked):
        if (wrong := _wrong_fields(asked)) is not None:
            return RequestError(wrong)
        tools = asked.get("tools") or ()
        asked = asked.get("prompt", asked.get("messages"))
    opening = [] if batch.system is None else [{"role": "system", "content": batch.system}]
    if isinstance(asked, list) and not batch.raw:
        has_own = bool(asked) and isinstance(asked[0], dict) and asked[0].get("role") == "system"
        # Checked as any conversation is.
        return Conversation(asked if has_own else [*opening, *asked], tools)
    if not isinstance(asked, str):
        expected = "a text or an object with prompt" + ("" if batch.raw else " or messages")
        return RequestError(f"the line holds no prompt; expected {expected}")
    if not asked.strip():
        return RequestError("the prompt is empty")
    if tools:
        return RequestError("tools go with messages")
    if batch.raw:
        return asked
    return [*opening, {"role": "user", "content": asked}]


def _wrong_fields(asked: dict[str, Any]) -> str | None:
    """What is wrong with the fields of a line's object; None for nothing."""
    if asked.keys() >= _PROMPTS:
        return "the line holds both prompt and messages; give one of them"
    if unread := [plain(name, 60) for name in asked if name not in _FIELDS]:
        more = f" and {len(unread) - _MOST_NAMED} more" if len(unread) > _MOST_NAMED else ""
        named = ", ".join(unread[:_MOST_NAMED]) + more
        return (
            f"not read in a line: {named}; it may hold prompt or messages, tools and id, and the "
            "options of the command hold for every line"
        )
    if "id" in asked and not _has_good_id(asked):
        return f"id is {shown(asked['id'])}; expected a text or a whole number"
    return None


def _digest(line: bytes, batch: Batch) -> str:
    """Digest everything an answer depends on: the prompt, the model's name and the settings."""
    settings = [batch.model, batch.dtypes, batch.system, batch.raw, asdict(batch.sampling)]
    return hashlib.sha256(json.dumps(settings).encode() + line).hexdigest()[:16]


def _count_done(out: IO[bytes], batch: Batch) -> tuple[int, int]:
    """Count the answers that are there, and the errors among them; a line that was cut off is taken
    back, and the next answer goes there.

    Errors: ConfigError where something else is there, which stays.
    """
    done, num_failed, whole = 0, 0, 0
    lines = batch.prompts.lines()
    while answer := out.readline(_LARGEST_ANSWER):
        line = next(lines, None)
        digest = None if line is None else _digest(line, batch)
        record = _record_in(answer)
        if not answer.endswith(b"\n") and _is_begun(answer, done, digest):
            break
        if digest is None or record.get("digest") != digest:
            raise ConfigError(_not_these_answers(batch.out, done, answer))
        done, whole = done + 1, out.tell()
        num_failed += "error" in record
    out.seek(whole)
    out.truncate(whole)
    return done, num_failed


def _is_begun(answer: bytes, index: int, digest: str | None) -> bool:
    """Whether bytes are the beginning of an answer's line."""
    begin = json.dumps({"index": index, "digest": digest}).removesuffix("}").encode()
    return digest is not None and begin.startswith(answer[: len(begin)])


def _not_these_answers(out: Path | None, done: int, answer: bytes) -> str:
    if done == 0 and not answer.startswith(b'{"index": '):
        return f"--out {out} holds something else than answers; name another file"
    return (
        f"{out} holds answers to other prompts, or of other settings, from line {done + 1} on; "
        "delete what is there from that line on, or name another file with --out"
    )


def _record_in(answer: bytes) -> dict[str, Any]:
    """A line's record; an empty one where it holds none."""
    try:
        record = json.loads(answer)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _append(out: IO[bytes], record: dict[str, Any]) -> None:
    is_output = out is sys.stdout.buffer
    try:
        out.write(json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
        out.flush()
        if not is_output:
            os.fsync(out.fileno())
    except BrokenPipeError as error:
        raise ReaderGoneError from error
    except OSError as error:
        raise unwritten("the output" if is_output else out.name, error) from error


@contextmanager
def _out_file(path: Path | None) -> Iterator[IO[bytes]]:
    if path is None:
        yield sys.stdout.buffer
        return
    with opened(path, "r+b" if path.exists() else "w+b") as file:
        yield file
