"""thinslice: run compact reasoning models inside a memory budget you name.

Importing this package is cheap: what a public name needs is loaded when it is first used.
docs/python.md tells what each name is for.
"""

from importlib import import_module

# The typing module is not imported: it takes longer than all else until the command line has
# taken care of Ctrl-C. Type checkers know the name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from thinslice.config import SamplingParams as SamplingParams
    from thinslice.config import Scheduling as Scheduling
    from thinslice.constraint import Constraint as Constraint
    from thinslice.engine.in_order import complete_in_order as complete_in_order
    from thinslice.engine.llm import LLM as LLM
    from thinslice.engine.logprobs import Logprobs as Logprobs
    from thinslice.engine.logprobs import TokenLogprobs as TokenLogprobs
    from thinslice.engine.request import Completion as Completion
    from thinslice.engine.request import TextChunk as TextChunk
    from thinslice.engine.request import ToolCall as ToolCall
    from thinslice.engine.stream import Stream as Stream
    from thinslice.errors import BudgetError as BudgetError
    from thinslice.errors import BusyError as BusyError
    from thinslice.errors import CheckpointError as CheckpointError
    from thinslice.errors import ConfigError as ConfigError
    from thinslice.errors import ContextError as ContextError
    from thinslice.errors import RequestError as RequestError
    from thinslice.errors import StoreError as StoreError
    from thinslice.errors import ThinsliceError as ThinsliceError
    from thinslice.plan.memory_plan import MemoryPlan as MemoryPlan
    from thinslice.plan.predict import Prediction as Prediction
    from thinslice.text.messages import Conversation as Conversation
    from thinslice.text.messages import Message as Message

__version__ = "0.1.0"

_HOMES = {
    "LLM": "thinslice.engine.llm",
    "complete_in_order": "thinslice.engine.in_order",
    "Conversation": "thinslice.text.messages",
    "Message": "thinslice.text.messages",
    "Stream": "thinslice.engine.stream",
    "Constraint": "thinslice.constraint",
    "SamplingParams": "thinslice.config",
    "Scheduling": "thinslice.config",
    "Completion": "thinslice.engine.request",
    "TextChunk": "thinslice.engine.request",
    "ToolCall": "thinslice.engine.request",
    "Logprobs": "thinslice.engine.logprobs",
    "TokenLogprobs": "thinslice.engine.logprobs",
    "MemoryPlan": "thinslice.plan.memory_plan",
    "Prediction": "thinslice.plan.predict",
    "ThinsliceError": "thinslice.errors",
    "BudgetError": "thinslice.errors",
    "BusyError": "thinslice.errors",
    "CheckpointError": "thinslice.errors",
    "ConfigError": "thinslice.errors",
    "ContextError": "thinslice.errors",
    "RequestError": "thinslice.errors",
    "StoreError": "thinslice.errors",
}
__all__ = [
    "LLM",
    "BudgetError",
    "BusyError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Constraint",
    "ContextError",
    "Conversation",
    "Logprobs",
    "MemoryPlan",
    "Message",
    "Prediction",
    "RequestError",
    "SamplingParams",
    "Scheduling",
    "StoreError",
    "Stream",
    "TextChunk",
    "ThinsliceError",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
    "complete_in_order",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'thinslice' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
