"""How the store tells what it is doing; drawing it is the command line's work."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a step, the bytes of it that are done, and all its bytes (0 where unknown).

A new description is a new step with a count of its own.
"""


def silent(description: str, done: int, total: int) -> None:
    """Report to nobody."""
