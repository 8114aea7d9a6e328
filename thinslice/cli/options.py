"""Options that several commands share."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from thinslice.config import SamplingParams


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded.

    Attributes:
        memory: The budget: the most the whole process may hold, as 4GiB or 4GB. Without it, 80% of
            what is free.
        context: Tokens of prompt and completion together. Without it, as many as fit.
        dtype: Of weights, activations and KV cache. auto is bfloat16 where the processor has it.
        offline: Use no network: only a model that is here already is found.
    """

    memory: str | None = None
    context: int | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    offline: bool = False


Load = Annotated[LoadOptions, Parameter(name="*", group=Group("Loading", sort_key=1))]
Sampling = Annotated[SamplingParams, Parameter(name="*", group=Group("Sampling", sort_key=2))]
Json = Annotated[bool, Parameter(name="--json")]
