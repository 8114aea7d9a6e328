"""The border to the compiled CPU kernels: every argument is checked here, then addresses cross.

A result's bits do not depend on how many rows are computed together, on the number of threads, on
the chunk, nor on the instruction set. Nothing here falls back to another implementation.
"""

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from thinslice.errors import ConfigError
from thinslice.kernels.arrays import BF16, Floats, empty
from thinslice.kernels.packed import PackedWeight
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.plan.packed_format import PackedFormat

_native: ModuleType | None
try:
    from thinslice import _native  # type: ignore[no-redef]
except ImportError as error:
    _native, _import_error = None, str(error)
else:
    _import_error = ""

# Rows of a matrix: float32 or bfloat16 numbers, or packed.
Matrix = NDArray[np.generic] | PackedWeight

FORMAT_CODES = {PackedFormat.INT4: 0, PackedFormat.INT4M: 1, PackedFormat.INT8: 2}
_NUMBER_CODES = {BF16: 3, np.dtype(np.float32): 4}
MAX_THREADS = 1024


def is_available() -> bool:
    """Whether the kernels were built and can be loaded."""
    return _native is not None


def describe() -> str:
    """One line for a person: the instruction set and threads in use, or why there is none."""
    if _native is None:
        return f"no compiled CPU kernels: {_import_error}"
    return f"CPU kernels: {_native.isa()}, {_native.num_threads()} threads"


def available_isas() -> list[str]:
    """Instruction sets this processor can run, newest first."""
    return library().available_isas()


def isa() -> str:
    """The instruction set in use."""
    return library().isa()


def set_isa(name: str) -> None:
    """Use one of `available_isas()` from now on, in the whole process. ValueError for others."""
    library().set_isa(name)


def num_threads() -> int:
    """Threads a kernel runs on, the caller's included."""
    return library().num_threads()


def set_num_threads(count: int) -> int:
    """Use this many threads from now on, in the whole process, or as many as the system starts.

    Returns:
        How many there are, the caller's included.
    """
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"one to {MAX_THREADS} threads can be used, got {count}")
    return library().set_num_threads(count)


def read_memory(data: NDArray[np.uint8]) -> None:
    """Read a contiguous uint8 array on all threads, to measure how fast memory can be read."""
    check_array(data, np.uint8, (data.size,), "data")
    library().read_memory(data.ctypes.data, data.size)


def panel_bytes(fmt: PackedFormat, in_features: int) -> int:
    """Bytes of a panel as the kernels step over it; `packed.panel_bytes` must agree."""
    return library().panel_bytes(FORMAT_CODES[fmt], in_features)


def linear(
    x: Floats,
    weight: Matrix,
    *,
    bias: Floats | None = None,
    residual: Floats | None = None,
    out: Floats | None = None,
) -> Floats:
    """x [T, K] times the transpose of [N, K], plus bias [N], plus residual [T, N], in float32.

    residual may be out itself.
    Peak extra memory: of a packed matrix 44 bytes for 32 inputs of each row (84 where the weight is
    wide), of at most 512 rows; of numbers 4 bytes for each input of at most 256 rows.
    """
    num_rows, (rows, columns) = len(x), size_of(weight)
    if out is None:
        out = empty((num_rows, rows), np.float32)
    _check_rows(x, num_rows, columns, "x")
    _check_rows(out, num_rows, rows, "out")
    if residual is not None:
        _check_rows(residual, num_rows, rows, "residual")
    target = (
        *weight_address(weight, bias),
        0 if residual is None else residual.ctypes.data,
        0 if residual is None else _stride(residual),
        out.ctypes.data,
        _stride(out),
    )
    library().linear(x.ctypes.data, num_rows, columns, _stride(x), target)
    return out


def rms_norm(x: Floats, weight: Floats, eps: float, *, out: Floats | None = None) -> Floats:
    """x [T, D] over its root mean square, times weight [D]; out may be x."""
    num_rows, dim = len(x), len(weight)
    if out is None:
        out = empty(x.shape, np.float32)
    check_array(weight, np.float32, (dim,), "weight")
    _check_rows(x, num_rows, dim, "x")
    _check_rows(out, num_rows, dim, "out")
    library().rms_norm(
        num_rows,
        x.ctypes.data,
        _stride(x),
        weight.ctypes.data,
        out.ctypes.data,
        _stride(out),
        dim,
        eps,
    )
    return out


def rope_(x: Floats, positions: NDArray[np.int64], cos: Floats, sin: Floats) -> Floats:
    """Rotate the first 2R of the H values of x [T, N, H] in place, value i with value i + R.

    cos and sin are [positions, R], positions [T].
    Errors: ValueError for a position outside the tables.
    """
    _check_heads(x, x.shape[1], x.shape[2], "x")
    check_array(positions, np.int64, (len(x),), "positions")
    check_array(cos, np.float32, cos.shape, "cos")
    check_array(sin, np.float32, cos.shape, "sin")
    half = cos.shape[1]
    if 2 * half > x.shape[2]:
        raise ValueError(f"cannot rotate {2 * half} of {x.shape[2]} values")
    library().rope(
        x.ctypes.data,
        x.shape[0],
        _stride(x),
        x.shape[1],
        x.shape[2],
        2 * half,
        positions.ctypes.data,
        cos.ctypes.data,
        sin.ctypes.data,
        len(cos),
    )
    return x


def silu_mul(gate: Floats, up: Floats, *, out: Floats | None = None) -> Floats:
    """silu(gate) * up for [T, F]; out may be either."""
    if out is None:
        out = empty(gate.shape, np.float32)
    num_rows, dim = gate.shape
    for part, name in ((gate, "gate"), (up, "up"), (out, "out")):
        _check_rows(part, num_rows, dim, name)
    library().silu_mul(
        num_rows,
        gate.ctypes.data,
        _stride(gate),
        up.ctypes.data,
        _stride(up),
        out.ctypes.data,
        _stride(out),
        dim,
    )
    return out


def write_kv(k: Floats, v: Floats, cache: PagedKv, slots: NDArray[np.int64]) -> None:
    """Put k, v [T, K, H] where slots [T] say: block * block_size + offset.

    Errors: ValueError for a slot outside the cache.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    _check_heads(k, heads, dim, "k")
    _check_heads(v, heads, dim, "v")
    if len(k) != len(v):
        raise ValueError("k and v must have one number of tokens")
    check_array(slots, np.int64, (len(k),), "slots")
    library().write_kv(
        cache.addresses,
        k.ctypes.data,
        _stride(k),
        v.ctypes.data,
        _stride(v),
        slots.ctypes.data,
        len(k),
    )


def attention(
    q: Floats, cache: PagedKv, batch: SequenceBatch, *, scale: float, window: int = 0
) -> Floats:
    """Causal attention of q [T, N, H] over the cached positions, the new tokens' included.

    N is a multiple of the cache's heads. A token sees the last `window` positions, its own among
    them, or all of them for 0.
    Peak extra memory: the result; on each thread 4 * (32 * N / K * (2 * H + 66) + 192 * H) bytes, H
    up to a multiple of 16.
    Errors: ValueError for a batch whose lengths or blocks do not fit the cache.
    Source: online softmax, Milakov and Gimelshein 2018; slices of 64 positions.
    """
    heads, dim = cache.k.shape[1], cache.k.shape[3]
    _check_heads(q, q.shape[1], dim, "q")
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} KV heads")
    if window < 0:
        raise ValueError(f"a window is 0 or more positions, got {window}")
    out = empty(q.shape, np.float32)
    queries = (
        q.ctypes.data,
        _stride(q),
        out.ctypes.data,
        _stride(out),
        len(q),
        q.shape[1],
    )
    library().attention(cache.addresses, queries, batch.addresses, scale, window)
    return out


def library() -> ModuleType:
    """The compiled module. Errors: ConfigError where there is none."""
    if _native is None:
        raise ConfigError(f"{describe()}; install thinslice again where a C++ compiler is")
    return _native


def size_of(weight: Matrix) -> tuple[int, int]:
    """Rows and columns of a matrix."""
    if isinstance(weight, PackedWeight):
        return weight.out_features, weight.in_features
    if weight.ndim != 2:
        raise ValueError(f"a matrix is [rows, columns], got {list(weight.shape)}")
    return weight.shape[0], weight.shape[1]


def weight_address(weight: Matrix, bias: Floats | None) -> tuple[int, int, int, int, int]:
    """What crosses the border of a matrix: data, format, width of activations, rows, bias."""
    rows, columns = size_of(weight)
    if bias is not None:
        check_array(bias, np.float32, (rows,), "bias")
    bias_address = 0 if bias is None else bias.ctypes.data
    if isinstance(weight, PackedWeight):
        code, is_wide = FORMAT_CODES[weight.format], int(weight.is_wide)
        return weight.address, code, is_wide, rows, bias_address
    if weight.dtype not in _NUMBER_CODES:
        raise TypeError(f"a matrix is packed, float32 or bfloat16, got {weight.dtype}")
    check_array(weight, weight.dtype, (rows, columns), "matrix")
    return weight.ctypes.data, _NUMBER_CODES[weight.dtype], 0, rows, bias_address


def _check_heads(x: Floats, heads: int, dim: int, name: str) -> None:
    """[T, heads, dim] whose tokens are contiguous."""
    if x.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {x.dtype}")
    if x.ndim != 3 or x.shape[1:] != (heads, dim):
        raise ValueError(f"{name} must be [tokens, {heads}, {dim}], got {list(x.shape)}")
    if x.strides[2] != 4 or (x.strides[1] != 4 * dim and heads > 1):
        raise ValueError(f"the tokens of {name} must be contiguous, strides {x.strides}")


def check_array(
    x: NDArray[np.generic], dtype: np.dtype | type, shape: tuple[int, ...], name: str
) -> None:
    """A contiguous array of this type and shape."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, got {x.dtype}")
    if x.shape != shape or not x.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous {list(shape)}, got {list(x.shape)}")


def _check_rows(x: Floats, rows: int, columns: int, name: str) -> None:
    """[rows, columns] whose rows are contiguous."""
    if x.dtype != np.float32:
        raise TypeError(f"{name} must be float32, got {x.dtype}")
    if x.shape != (rows, columns):
        raise ValueError(f"{name} must be [{rows}, {columns}], got {list(x.shape)}")
    if x.strides[1] != 4 and columns > 1:
        raise ValueError(f"the rows of {name} must be contiguous, strides {x.strides}")


def _stride(x: Floats) -> int:
    """Numbers from one row to the next."""
    return x.strides[0] // 4
