"""Numbers of one float type in the place of numbers of another."""

import numpy as np

from thinslice.kernels import native_pack
from thinslice.kernels.arrays import Numbers, empty


def convert(source: Numbers, target: Numbers) -> None:
    """Fill an array with the numbers of another of its shape, rounded to nearest even.

    Extra memory: ``source`` once more where it is not contiguous.
    """
    if source.dtype == target.dtype:
        target[...] = source
    else:
        native_pack.convert(np.ascontiguousarray(source), target)


def converted(source: Numbers, dtype: np.dtype) -> Numbers:
    """The numbers in a type: the array itself, where they are."""
    if source.dtype == dtype:
        return source
    target = empty(source.shape, dtype)
    convert(source, target)
    return target
