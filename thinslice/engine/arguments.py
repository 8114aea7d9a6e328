"""What LLM is given: its options as Python sees them, arguments that are checked, and errors in
Python's words."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from inspect import Parameter, Signature, signature
from typing import Any, TypedDict, TypeVar

from thinslice.config import (
    DEFAULT_SCHEDULING,
    DeviceName,
    Draft,
    Dtype,
    EngineSettings,
    Forms,
    KvDtype,
    MtpHidden,
    SamplingParams,
    Scheduling,
)
from thinslice.errors import RequestError, ThinsliceError, shown
from thinslice.store.names import nearest_names

# Options whose names are not simply those of the fields.
_OTHER_NAMES = {"sequences": "max_num_seqs"}
_OPTION = re.compile(
    r"--(?P<name>[a-z]+(?:-[a-z]+)*)"
    r"(?: (?P<value>[\d.]+(?:[KMGT]i?B)?|auto|bfloat16|float32|int8|int4|cpu|cuda|ngram|mtp|off|"
    r"pre-norm|post-norm)\b)?"
)

_Given = TypeVar("_Given", SamplingParams, Scheduling)


class Settings(TypedDict, total=False):
    """The fields of EngineSettings, as keyword arguments of LLM."""

    memory: str | int | None
    device: DeviceName
    host_memory: str | int | None
    context: int | None
    dtype: Dtype
    kv_dtype: KvDtype
    draft: Draft
    draft_length: int
    mtp_hidden: MtpHidden
    offline: bool
    max_num_seqs: int
    reserve: str | int
    reserve_per_token: int
    forms: Forms


def with_settings(init: Callable[..., None]) -> Signature:
    """The signature of a class whose ``**settings`` are the fields of EngineSettings."""
    given = [one for one in signature(init).parameters.values() if one.name != "self"]
    named = [one for one in given if one.kind is not Parameter.VAR_KEYWORD]
    settings = [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(EngineSettings)
    ]
    return Signature([*named, *settings])


def check_settings(given: Mapping[str, object]) -> None:
    """Errors: TypeError for what is no field of EngineSettings, as Python has it for arguments."""
    known = [field.name for field in fields(EngineSettings)]
    for name in given:
        if name not in known:
            near = nearest_names(name, known)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"LLM() has no argument {name!r}{guess}")


@contextmanager
def errors_in_python() -> Iterator[None]:
    """Have errors name LLM's arguments; the command line finds its own words in them too."""
    try:
        yield
    except ThinsliceError as error:
        text = str(error)
        told = _OPTION.sub(_as_argument, text)
        if told != text:
            error.with_options = text
            error.args = (told, *error.args[1:])
        raise


def for_each(
    name: str, given: object, count: int, checked: Callable[[object], _Given]
) -> list[_Given]:
    """One for each prompt, of one for all or a list."""
    if not isinstance(given, list | tuple):
        return [checked(given)] * count
    if len(given) != count:
        raise RequestError(f"{len(given)} {name} for {count} prompts; give one for each, or one")
    return [checked(one) for one in given]


def check_progress(progress: object) -> None:
    """Errors: RequestError for what cannot be called; None is nobody."""
    if progress is not None and not callable(progress):
        raise RequestError(f"progress is {shown(progress)}; expected a function")


def checked_params(params: object) -> SamplingParams:
    """The same, or the defaults for None. Errors: RequestError for anything else."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise RequestError(f"params is {shown(params)}; expected SamplingParams(...)")
    return params


def checked_scheduling(scheduling: object) -> Scheduling:
    """None is a Scheduling without values. Errors: RequestError for anything else."""
    scheduling = DEFAULT_SCHEDULING if scheduling is None else scheduling
    if not isinstance(scheduling, Scheduling):
        raise RequestError(f"scheduling is {shown(scheduling)}; expected Scheduling(...)")
    return scheduling


def _as_argument(match: "re.Match[str]") -> str:
    name = match["name"].replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in {field.name for field in fields(EngineSettings)}:
        return match[0]
    value: Any = match["value"]
    if value is None:
        return name
    return f"{name}={value}" if value.isdigit() else f'{name}="{value}"'
