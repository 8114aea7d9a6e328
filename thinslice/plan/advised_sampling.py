"""How a model's makers advise to sample it: generation_config.json, or the keys of a GGUF.

Source of the GGUF's keys: gguf 0.19, constants.py; llama.cpp samples by them where its user says
nothing else.
"""

from collections.abc import Mapping
from typing import Any

from thinslice.config import ADVISABLE, check_advisable
from thinslice.errors import CheckpointError, RequestError
from thinslice.plan.header_fields import HeaderFields

_GGUF_PREFIX = "general.sampling."
# What SamplingParams calls each of the GGUF's keys.
GGUF_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def advised_sampling(
    generation_config: Mapping[str, Any], source: str
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The sampling parameters that the file sets, by their names in SamplingParams.

    ``do_sample: false`` is greedy: temperature 0, whatever temperature stands beside it. A key
    whose value is null counts as absent.

    Args:
        source: the file, for the notes.

    Returns the parameters, and a line for each key that is left out because its value is of
    another type or out of range: advice is no reason not to run a model.
    """
    advised, notes = _valid({name: (name, generation_config.get(name)) for name in ADVISABLE})
    samples = generation_config.get("do_sample")
    if samples is False:
        advised["temperature"] = 0.0
    elif samples is not None and samples is not True:
        notes.append(f"do_sample is {samples!r:.60}; expected true or false")
    return advised, _left_out(notes, source)


def gguf_sampling(metadata: Mapping[str, Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """What a GGUF advises and what of it is left out, as ``advised_sampling`` has it."""
    fields = HeaderFields("GGUF", metadata, _GGUF_PREFIX)
    values = {key: (name, _short(fields, key)) for key, name in GGUF_NAMES.items()}
    advised, notes = _valid({f"{_GGUF_PREFIX}{key}": value for key, value in values.items()})
    return advised, _left_out(notes, "this GGUF")


def _short(fields: HeaderFields, key: str) -> Any:
    """A number as it was written before it became a float32, 0.7 say; else what is there."""
    value = fields.get(key)
    if not isinstance(value, float):
        return value
    try:
        return fields.short_number(key)
    except CheckpointError:
        return value


def _valid(values: Mapping[str, tuple[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Split values into those a parameter can have, and complaints about the others.

    Args:
        values: by the file's key, the name of the parameter and its value.
    """
    advised, wrong = dict[str, float](), []
    for key, (name, value) in values.items():
        if value is None:
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            check_advisable(name, value)
        except RequestError as error:
            wrong.append(f"{key}{str(error).removeprefix(name)}")
        else:
            advised[name] = value
    return advised, wrong


def _left_out(wrong: list[str], source: str) -> tuple[str, ...]:
    return tuple(f"{source}: {what}; this advice is left out" for what in wrong)
