"""Options that several commands share."""

import re
from typing import Annotated

from cyclopts import Group, Parameter

from thinslice.config import EngineSettings, SamplingParams

_LOADING = Group("Loading", sort_key=1)
# Several sequences are named where a command runs several. What a program reserves it says itself;
# for answers of others' forms a server does, and a plan may be one for a server.
Load = Annotated[
    EngineSettings,
    Parameter(name="*", parse=re.compile("^(?!max_num_seqs$|reserve|forms$)"), group=_LOADING),
]
LoadToServe = Annotated[
    EngineSettings,
    Parameter(name="*", parse=re.compile("^(?!max_num_seqs$|reserve)"), group=_LOADING),
]
Quiet = Annotated[bool, Parameter(name="--quiet")]
# What only has a meaning beside other requests is no option of a command.
FOR_ONE = re.compile("^(?!(n|logprobs|logit_bias|constraint)$)")
Sampling = Annotated[
    SamplingParams, Parameter(name="*", parse=FOR_ONE, group=Group("Sampling", sort_key=2))
]
Json = Annotated[bool, Parameter(name="--json")]
