"""Numbers of block types of a GGUF, by the package of the llama.cpp project."""

from collections.abc import Callable
from importlib import import_module

import numpy as np
from numpy.typing import NDArray


def dequantized(blocks: NDArray[np.uint8], name: str) -> NDArray[np.float32]:
    """The numbers in rows of blocks of a type, uint8 [N, bytes of a row].

    The package is imported by the first that asks, as few models have a type that needs it.
    Peak extra memory: up to 16 bytes for each number.
    """
    kinds = import_module("gguf.constants").GGMLQuantizationType
    dequantize: Callable[..., NDArray[np.float32]] = import_module("gguf.quants").dequantize
    # A block's scale may be any bytes; what it gives then is no number, but no fault either.
    with np.errstate(all="ignore"):
        return dequantize(blocks, kinds[name])
