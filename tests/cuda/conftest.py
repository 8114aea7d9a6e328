"""Kernels run in Triton's interpreter: it must be asked for before they are defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
