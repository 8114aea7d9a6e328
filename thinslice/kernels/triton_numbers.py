"""Two operations on numbers that Triton's interpreter does otherwise than a card.

The interpreter cuts float32 to bfloat16 where a card rounds, and multiplies the bit patterns of
bfloat16 tiles as whole numbers. Under it the same values are made by other means.
"""

import triton
import triton.language as tl

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """``a @ b`` in fp32 of two tiles of one type; float32 is not cut to TF32."""
    if _IS_INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded(x, kind: tl.constexpr):
    """fp32 as float32 or bfloat16, the nearest, to even between two."""
    if _IS_INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(kind)
