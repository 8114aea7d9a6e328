"""How a model's makers advise to sample it, as generation_config.json says."""

from collections.abc import Mapping
from typing import Any

from thinslice.config import ADVISABLE, check_advisable
from thinslice.errors import CheckpointError, RequestError


def advised_sampling(generation_config: Mapping[str, Any], source: str) -> dict[str, float]:
    """The sampling parameters that the file sets, by their names in SamplingParams.

    ``do_sample: false`` is greedy: temperature 0, whatever temperature stands beside it. A key
    whose value is null counts as absent.

    Args:
        source: the file, for error messages.

    Errors: CheckpointError naming file, key and value, where one is of another type or out of
    range.
    """
    advised = {}
    for name in ADVISABLE:
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            check_advisable(name, value)
        except RequestError as error:
            raise CheckpointError(f"{source}: {error}") from None
        advised[name] = value
    samples = generation_config.get("do_sample")
    if samples is not None and not isinstance(samples, bool):
        raise CheckpointError(f"{source}: do_sample is {samples!r:.60}; expected true or false")
    if samples is False:
        advised["temperature"] = 0.0
    return advised
