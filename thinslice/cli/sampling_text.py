"""Sampling parameters by name, as /set of chat reads and shows them."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from thinslice.cli.options import FOR_ONE
from thinslice.config import ADVISABLE, SamplingParams
from thinslice.errors import RequestError
from thinslice.store.names import nearest_names

NAMES = tuple(field.name for field in fields(SamplingParams) if FOR_ONE.match(field.name))
_OPTIONAL = ("seed", "max_tokens", "max_thinking_tokens", "max_thinking_seconds", *ADVISABLE)
_WHOLE = ("top_k", "seed", "max_tokens", "max_thinking_tokens")
_YES, _NO = ("on", "true", "yes", "1"), ("off", "false", "no", "0")


def changed(params: SamplingParams, text: str, advised: Mapping[str, float]) -> SamplingParams:
    """The parameters with one changed, as in ``temperature 0.2``; ``none`` takes one away.

    Args:
        advised: what the model's files advise, which holds again for what is taken away.

    Errors: RequestError for a name or a value that is not one.
    """
    name, _, value = text.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name not in NAMES:
        near = nearest_names(name, NAMES)
        guess = f"; did you mean {near[0]}?" if near else ";"
        raise RequestError(f"there is no parameter {name}{guess} /set alone shows them all")
    if not value:
        example = _example(params.resolved(advised), name)
        raise RequestError(f"which value? write for example /set {name} {example}")
    return replace(params, **{name: _parsed(name, value)})


def described(params: SamplingParams, name: str | None = None) -> str:
    """A line for each parameter, or for the one that is named."""
    names = NAMES if name is None else (name.replace("-", "_"),)
    return "\n".join(f"{name:<22}{_shown(getattr(params, name))}" for name in names)


def _parsed(name: str, value: str) -> Any:
    if name == "stop":
        return () if value == "none" else (value,)
    if value == "none" and name in _OPTIONAL:
        return None
    try:
        if name == "stop_token_ids":
            return () if value == "none" else tuple(int(one) for one in value.split())
        if name == "ignore_eos":
            return _switch(value)
        return int(value) if name in _WHOLE else float(value)
    except ValueError:
        kind = "on or off" if name == "ignore_eos" else "a number"
        if name in _WHOLE or name == "stop_token_ids":
            kind = "a whole number"
        raise RequestError(f"{name} is {value!r:.60}; expected {kind}") from None


def _switch(value: str) -> bool:
    if value.lower() not in (*_YES, *_NO):
        raise ValueError(value)
    return value.lower() in _YES


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    return " ".join(str(one) for one in value) if isinstance(value, tuple) else str(value)


def _example(params: SamplingParams, name: str) -> str:
    present = _shown(getattr(params, name))
    return "42" if present == "none" and name != "stop" else present
