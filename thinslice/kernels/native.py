"""The border to the compiled CPU kernels: every argument is checked here, then addresses cross.

A result's bits do not depend on how many rows are computed together, on the number of threads, on
the chunk, nor on the instruction set. Nothing here falls back to another implementation; callers
ask `is_available()`.
"""

from collections.abc import Sequence
from types import ModuleType

import torch

from thinslice.kernels.packed import PackedWeight
from thinslice.plan.packed_format import GROUP, PackedFormat

_native: ModuleType | None
try:
    from thinslice import _native  # type: ignore[no-redef]
except ImportError as error:
    _native, _import_error = None, str(error)
else:
    _import_error = ""

FORMAT_CODES = {PackedFormat.INT4: 0, PackedFormat.INT4M: 1, PackedFormat.INT8: 2}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
MAX_MATRICES = 4
MAX_THREADS = 1024
_REPACKED = {
    "Q4_0": (0, PackedFormat.INT4, 18),
    "Q4_1": (1, PackedFormat.INT4M, 20),
    "Q8_0": (2, PackedFormat.INT8, 34),
}
REPACKED_TYPES = frozenset(_REPACKED)


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


def read_memory(data: torch.Tensor) -> None:
    """Read a contiguous uint8 tensor on all threads, to measure how fast memory can be read."""
    check_indices(data, torch.uint8, [data.numel()], "data")
    library().read_memory(data.data_ptr(), data.numel())


def repack(blocks: torch.Tensor, kind: str, target: PackedWeight) -> None:
    """Put the blocks [N, bytes of a row] of a GGUF matrix into a packed one, their codes as they
    are.

    Args:
        kind: Q4_0 (into int4), Q4_1 (int4m) or Q8_0 (int8).
    """
    code, fmt, block_bytes = _REPACKED[kind]
    groups = target.in_features // GROUP
    check_indices(blocks, torch.uint8, [target.out_features, groups * block_bytes], "blocks")
    if target.format is not fmt:
        raise ValueError(f"{kind} goes into {fmt}, not into {target.format}")
    library().repack(blocks.data_ptr(), code, target.out_features, groups, target.data.data_ptr())


def panel_bytes(fmt: PackedFormat, in_features: int) -> int:
    """Bytes of a panel as the kernels step over it; `packed.panel_bytes` must agree."""
    return library().panel_bytes(FORMAT_CODES[fmt], in_features // GROUP)


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K] times the transpose of a packed [N, K], plus bias [N], plus residual [T, N].

    x is fp32 or bf16; out is fp32 or bf16 and takes x's dtype where it is not given; residual has
    out's dtype and may be out itself. bias is fp32.
    Peak extra memory: 44 bytes for 32 inputs of each row (84 where the weight is wide), of at most
    512 rows.
    """
    if out is None:
        out = x.new_empty((x.shape[0], weight.out_features))
    _check_rows(x, weight.in_features, "x")
    target = _target(weight, x.shape[0], bias, residual, out)
    library().linear(*_rows_of(x), DTYPE_CODES[out.dtype], False, [target])
    return out


def linears(
    x: torch.Tensor,
    weights: Sequence[PackedWeight],
    *,
    biases: Sequence[torch.Tensor | None] | None = None,
    outs: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Several `linear`s of the same x in one: x is quantised once. At most MAX_MATRICES."""
    if not 1 <= len(weights) <= MAX_MATRICES:
        raise ValueError(f"one to {MAX_MATRICES} matrices at once, got {len(weights)}")
    if outs is None:
        outs = [x.new_empty((x.shape[0], weight.out_features)) for weight in weights]
    if biases is None:
        biases = [None] * len(weights)
    targets = []
    for weight, bias, out in zip(weights, biases, outs, strict=True):
        _check_rows(x, weight.in_features, "x")
        targets.append(_target(weight, x.shape[0], bias, None, out))
        if out.dtype != outs[0].dtype:
            raise TypeError("results computed together must have one dtype")
    library().linear(*_rows_of(x), DTYPE_CODES[outs[0].dtype], False, targets)
    return list(outs)


def gate_up_swiglu(
    x: torch.Tensor, gate: PackedWeight, up: PackedWeight, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(x gateᵀ) * (x upᵀ): [T, F]. For a slice of F pass gate.rows(a, b) and up.rows(a, b)."""
    if gate.out_features != up.out_features or gate.in_features != up.in_features:
        raise ValueError(
            f"gate [{gate.out_features}, {gate.in_features}] and up "
            f"[{up.out_features}, {up.in_features}] must have one shape"
        )
    if out is None:
        out = x.new_empty((x.shape[0], gate.out_features))
    _check_rows(x, gate.in_features, "x")
    targets = [_target(weight, x.shape[0], None, None, out) for weight in (gate, up)]
    library().linear(*_rows_of(x), DTYPE_CODES[out.dtype], True, targets)
    return out


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, D] over its root mean square, times weight [D] fp32; sums in fp32, one rounding.

    With a residual [T, D], x is first added to it in place and the sum is normalised. out may be x.
    """
    if out is None:
        out = torch.empty_like(x)
    dim = weight.shape[0]
    check_vector(weight, dim, "weight")
    for tensor, name in ((x, "x"), (out, "out"), (residual, "residual")):
        if tensor is not None:
            _check_like(tensor, x, dim, name)
    library().rms_norm(
        x.shape[0],
        x.data_ptr(),
        x.stride(0),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        dim,
        DTYPE_CODES[x.dtype],
        eps,
    )
    return out


def rope_(
    x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """Rotate the first 2R of the H values of x [T, N, H] in place, value i with value i + R.

    cos and sin are fp32 [positions, R], positions int64 [T].
    Errors: ValueError for a position outside the tables.
    """
    check_heads(x, x.shape[1], x.shape[2], "x")
    check_indices(positions, torch.int64, [x.shape[0]], "positions")
    half = cos.shape[1]
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(f"cos and sin must be float32, got {cos.dtype} and {sin.dtype}")
    if cos.shape != sin.shape or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("cos and sin must be contiguous and of one shape")
    if 2 * half > x.shape[2]:
        raise ValueError(f"cannot rotate {2 * half} of {x.shape[2]} values")
    library().rope(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[0],
        x.stride(0),
        x.shape[1],
        x.shape[2],
        2 * half,
        positions.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[0],
    )
    return x


def silu_mul(
    gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(gate) * up for [T, F] of one dtype; out may be either."""
    if out is None:
        out = torch.empty_like(gate)
    for tensor, name in ((gate, "gate"), (up, "up"), (out, "out")):
        _check_like(tensor, gate, gate.shape[1], name)
    library().silu_mul(
        gate.shape[0],
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        out.data_ptr(),
        out.stride(0),
        gate.shape[1],
        DTYPE_CODES[gate.dtype],
    )
    return out


def library() -> ModuleType:
    """The compiled module; RuntimeError where there is none."""
    if _native is None:
        raise RuntimeError(f"the CPU kernels are not built: {_import_error}")
    return _native


def check_heads(x: torch.Tensor, heads: int, dim: int, name: str) -> None:
    """A CPU tensor [T, heads, dim] of fp32 or bf16 whose tokens are contiguous."""
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} must be float32 or bfloat16, got {x.dtype}")
    if x.dim() != 3 or x.shape[1] != heads or x.shape[2] != dim:
        raise ValueError(f"{name} must be [tokens, {heads}, {dim}], got {list(x.shape)}")
    if x.stride(2) != 1 or (x.stride(1) != dim and heads > 1):
        raise ValueError(f"the tokens of {name} must be contiguous, strides {x.stride()}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, is on {x.device}")


def check_indices(x: torch.Tensor, dtype: torch.dtype, shape: list[int], name: str) -> None:
    """A contiguous CPU tensor of this integer type and shape."""
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
    if list(x.shape) != shape or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"{name} must be a contiguous {shape} on the CPU, got {list(x.shape)}")


def _check_rows(x: torch.Tensor, columns: int, name: str) -> None:
    """A CPU tensor [T, columns] of fp32 or bf16 whose rows are contiguous."""
    if x.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} must be float32 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != columns:
        raise ValueError(f"{name} must be [rows, {columns}], got {list(x.shape)}")
    if x.stride(1) != 1 and columns > 1:
        raise ValueError(f"the rows of {name} must be contiguous, strides {x.stride()}")
    if x.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, is on {x.device}")


def _rows_of(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), DTYPE_CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def weight_address(
    weight: PackedWeight, bias: torch.Tensor | None
) -> tuple[int, int, int, int, int]:
    """What crosses the border of a matrix: data, format, width of activations, rows, bias."""
    if bias is not None:
        check_vector(bias, weight.out_features, "bias")
    return (
        weight.data.data_ptr(),
        FORMAT_CODES[weight.format],
        int(weight.is_wide),
        weight.out_features,
        0 if bias is None else bias.data_ptr(),
    )


def _target(
    weight: PackedWeight,
    rows: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[int, ...]:
    _check_rows(out, weight.out_features, "out")
    _check_count(out, rows, "out")
    if residual is not None:
        _check_rows(residual, weight.out_features, "residual")
        _check_count(residual, rows, "residual")
        if residual.dtype != out.dtype:
            raise TypeError(f"residual must have out's dtype {out.dtype}, got {residual.dtype}")
    return (
        *weight_address(weight, bias),
        0 if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        out.stride(0),
    )


def _check_like(x: torch.Tensor, like: torch.Tensor, columns: int, name: str) -> None:
    _check_rows(x, columns, name)
    _check_count(x, like.shape[0], name)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, got {x.dtype}")


def _check_count(x: torch.Tensor, rows: int, name: str) -> None:
    if x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got {x.shape[0]}")


def check_vector(x: torch.Tensor, size: int, name: str) -> None:
    """A contiguous float32 tensor [size]."""
    if x.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {x.dtype}")
    if list(x.shape) != [size] or not x.is_contiguous():
        raise ValueError(f"{name} must be a contiguous [{size}], got {list(x.shape)}")
