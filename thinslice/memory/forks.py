"""What a child of a fork needs before it computes with torch."""

import os
from functools import cache, partial

import torch


@cache
def prepare_for_forks() -> None:
    """Let torch compute on one thread in every child of this process from now on.

    A child has none of the threads of torch's pool, and an operation on several would wait for them
    for ever. Other libraries' code in the child is on one thread as well, and not stuck.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
