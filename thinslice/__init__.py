"""thinslice: run compact reasoning models inside a memory budget you name.

Importing this package is cheap: torch is loaded when a public name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinslice.config import SamplingParams as SamplingParams
    from thinslice.engine.llm import LLM as LLM
    from thinslice.plan.planner import plan as plan

__version__ = "0.1.0"

_HOMES = {
    "LLM": "thinslice.engine.llm",
    "SamplingParams": "thinslice.config",
    "plan": "thinslice.plan.planner",
}
__all__ = ["LLM", "SamplingParams", "__version__", "plan"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'thinslice' has no attribute {name!r}")
