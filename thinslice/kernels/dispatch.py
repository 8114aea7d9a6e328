"""Which implementation of the operators a model runs on. The choice is made once, and shown."""

from importlib import import_module
from typing import Protocol, cast

import torch

from thinslice.kernels import native, native_ops, torch_ops
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.kernels.torch_ops import Rows


class Ops(Protocol):
    """The operators, as torch_ops documents them."""

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, /) -> torch.Tensor:
        """Root-mean-square norm over the last dimension."""

    def apply_rotary(
        self, x_TNH: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor, /
    ) -> torch.Tensor:
        """Rotary embedding."""

    def linear(
        self,
        x_TD: torch.Tensor,
        rows: Rows,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Product with the transpose of some rows."""

    def swiglu_(self, gate_TF: torch.Tensor, up_TF: torch.Tensor, /) -> torch.Tensor:
        """SwiGLU in place."""

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        cache: PagedKv,
        slots_T: torch.Tensor,
        sequences: SequenceBatch,
        window: int | None = None,
    ) -> torch.Tensor:
        """Write K and V, then causal attention over the cache."""


TORCH = cast(Ops, torch_ops)
NATIVE = cast(Ops, native_ops)


def cuda_ops() -> Ops:
    """The operators on a CUDA card. Only there is Triton needed; importing it takes a second."""
    return cast(Ops, import_module("thinslice.kernels.cuda_ops"))


def is_native(dtype: str, head_dim: int) -> bool:
    """Whether models of this dtype run on the compiled kernels.

    float32 stays on torch: it is the arithmetic other implementations are compared with.
    """
    return dtype != "float32" and head_dim % 16 == 0 and native.is_available()


def ops_for(dtype: str, head_dim: int) -> Ops:
    """The operators for a model of this dtype."""
    return NATIVE if is_native(dtype, head_dim) else TORCH
