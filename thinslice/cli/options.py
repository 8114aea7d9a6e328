"""Options that several commands share."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from thinslice.config import EngineSettings, SamplingParams


@dataclass(frozen=True)
class FitOptions:
    """What a plan is made for.

    Attributes:
        memory: The budget: the most the whole process may hold, as 4GiB or 4GB; no more than this
            machine or its control group has. Without it, 80% of the memory that is free, or 95% of
            a control group that nothing else runs in. With --device cuda it is that of the card's
            memory, CUDA's context included.
        device: What computes: cpu, or cuda, which is never chosen for you. It has not been run on a
            card yet.
        host_memory: Beside --device cuda, the most the process may hold in the machine's own
            memory. Without it, a share as of --memory.
        context: Tokens of prompt and completion together. Without it, as many as fit beside
            weights in memory, if 1,024 do; else the weights are streamed.
        dtype: What the weights are computed with. auto is what the file has: int4 or int8 where it
            is quantised so, else bfloat16 where the processor has it. A model of floats is packed
            for int4 or int8 the first time, and its copy kept in the store.
        kv_dtype: Of the KV cache. auto is bfloat16; float32 beside --dtype float32.
        draft: Who guesses at the next tokens, several of which are then checked at once; the text
            stays the same. ngram is what followed the last tokens earlier in the text, mtp the
            model's own prediction layer, auto the first where it finds something and else the
            second, where the model has one and it fits beside a resident head.
        draft_length: The most tokens guessed at a time. As many are as have paid so far, or none.
        mtp_hidden: What the prediction layer takes of the model: its last hidden state before or
            after the final norm, as the layer was trained; MiMo's take it before.
    """

    memory: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    host_memory: str | None = None
    context: int | None = None
    dtype: Literal["auto", "bfloat16", "float32", "int8", "int4"] = "auto"
    kv_dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    draft: Literal["auto", "ngram", "mtp", "off"] = "auto"
    draft_length: int = 8
    mtp_hidden: Literal["pre-norm", "post-norm"] = "pre-norm"

    def settings(self, max_num_seqs: int = 1) -> EngineSettings:
        """What a model is planned or loaded with. Errors: ConfigError for what is out of range."""
        names = {field.name for field in fields(EngineSettings)}
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name in names}
        return EngineSettings(**given, max_num_seqs=max_num_seqs)


@dataclass(frozen=True)
class LoadOptions(FitOptions):
    """How a model is loaded.

    Attributes:
        offline: Use no network: only a model that is here already is found.
        quiet: Print the answer and errors only: no notes, no progress.
    """

    offline: bool = False
    quiet: bool = False


Fit = Annotated[FitOptions, Parameter(name="*", group=Group("Loading", sort_key=1))]
Load = Annotated[LoadOptions, Parameter(name="*", group=Group("Loading", sort_key=1))]
# What only has a meaning beside other requests is no option of a command.
FOR_ONE = re.compile("^(?!(n|logprobs|priority|deadline_s|cache_salt)$)")
Sampling = Annotated[
    SamplingParams, Parameter(name="*", parse=FOR_ONE, group=Group("Sampling", sort_key=2))
]
Json = Annotated[bool, Parameter(name="--json")]
