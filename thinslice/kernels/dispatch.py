"""Which implementation of the operators a model runs on. The choice is made once, and shown."""

from importlib import import_module

from thinslice.kernels import native, native_ops, native_stack, torch_ops
from thinslice.kernels.ops import Ops

TORCH = Ops(
    rms_norm=torch_ops.rms_norm,
    apply_rotary=torch_ops.apply_rotary,
    product=torch_ops.product,
    swiglu_=torch_ops.swiglu_,
    attend=torch_ops.attend,
)
NATIVE = Ops(
    rms_norm=native_ops.rms_norm,
    apply_rotary=native_ops.apply_rotary,
    product=native_ops.product,
    swiglu_=native_ops.swiglu_,
    attend=native_ops.attend,
    fuse=native_stack.fuse,
    fuse_prediction=native_stack.fuse_prediction,
)


def cuda_ops() -> Ops:
    """The operators on a CUDA card. Only there is Triton needed; importing it takes a second."""
    ops: Ops = import_module("thinslice.kernels.cuda_ops").CUDA
    return ops


def is_native(dtype: str, head_dim: int) -> bool:
    """Whether models of this dtype run on the compiled kernels.

    float32 stays on torch: it is the arithmetic other implementations are compared with.
    """
    return dtype != "float32" and head_dim % 16 == 0 and native.is_available()


def ops_for(dtype: str, head_dim: int) -> Ops:
    """The operators for a model of this dtype."""
    return NATIVE if is_native(dtype, head_dim) else TORCH
