"""Triton's kernels, interpreted, against the numbers that packed matrices stand for and torch."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.arrays import tensor_of
from tests.numerics.oracle import random_packed
from thinslice.kernels import cuda_ops, torch_ops, triton_attention, triton_linear
from thinslice.kernels.packed import PackedWeight, unpack
from thinslice.kernels.paged_kv import PagedKv, SequenceBatch
from thinslice.plan.packed_format import PackedFormat

BLOCK_SIZE = 16
SIZES = [(96, 64), (40, 96), (33, 160)]  # whole panels, and not; pairs of groups, and not
each_format = pytest.mark.parametrize("fmt", PackedFormat)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def exact(x_TD: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return x_TD.double() @ torch.as_tensor(unpack(weight)).double().T


def linear(
    x_TD: torch.Tensor, weight: PackedWeight, *others: torch.Tensor, **more: torch.Tensor
) -> torch.Tensor:
    """The kernels' product with a matrix of the host, as a device has it."""
    there = replace(weight, data=tensor_of(weight.data))
    return triton_linear.linear(x_TD, there, *others, **more)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_format
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [1, 3, 17, 70])
def test_products_are_those_of_the_numbers(
    fmt: PackedFormat, size: tuple[int, int], num_rows: int
) -> None:
    weight, x = random_packed(fmt, *size, seed=1), random(num_rows, size[1])
    bias, residual = random(size[0], seed=1), random(num_rows, 2 * size[0], seed=2)[:, : size[0]]
    entered = x if num_rows <= 16 else x.bfloat16()
    expected = (exact(entered, weight) + bias + residual).float()
    torch.testing.assert_close(linear(x, weight, bias, residual), expected)
    out = linear(x, weight, bias, residual, out=residual)
    assert out.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(residual, expected)


@each_format
@pytest.mark.parametrize("num_rows", [2, 20])
def test_products_of_bfloat16_are_the_nearest(fmt: PackedFormat, num_rows: int) -> None:
    weight, x = random_packed(fmt, 48, 96, seed=1), random(num_rows, 96).bfloat16()
    result = linear(x, weight)
    assert result.dtype == torch.bfloat16
    expected = exact(x, weight)
    error = (result.double() - expected).abs()
    assert (error <= expected.abs() * 2.0**-8 + 1e-5).all()


@each_format
def test_a_row_has_the_same_bits_in_any_company(fmt: PackedFormat) -> None:
    weight, x = random_packed(fmt, 40, 96, seed=1), random(16, 96)
    alone = linear(x[:1], weight)
    for num_rows in (2, 5, 16):
        assert torch.equal(linear(x[:num_rows], weight)[:1], alone)


@pytest.mark.parametrize("num_rows", [2, 20])
def test_a_fault_in_the_scales_is_seen(num_rows: int) -> None:
    """The comparison fails where the scales of two groups are exchanged."""
    weight, x = random_packed(PackedFormat.INT4, 48, 128, seed=1), random(num_rows, 128)
    faulty = tensor_of(weight.data).clone().view(3, 2, 576)
    faulty[:, :, 512:] = faulty[:, :, 512:].roll(32, dims=2)
    other = replace(weight, data=faulty.flatten())
    entered = x if num_rows <= 16 else x.bfloat16()
    expected = exact(entered, weight).float()
    torch.testing.assert_close(linear(x, weight), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(triton_linear.linear(x, other), expected)


def sequences_of(
    lengths: Sequence[int], counts: Sequence[int]
) -> tuple[SequenceBatch, NDArray[np.int64]]:
    """A batch whose blocks lie in no order, and the slots of its rows."""
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(3)).tolist()
    tables = np.zeros((len(lengths), max(num_blocks)), np.int32)
    slots = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks = [order.pop() for _ in range(num_blocks[row])]
        tables[row, : len(blocks)] = blocks
        positions = range(length - count, length)
        slots += [blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in positions]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    return SequenceBatch(starts, np.array(lengths, np.int32), tables), np.array(slots)


def attended(
    ops: object, dtype: torch.dtype, head_dim: int, window: int | None, batch: SequenceBatch
) -> torch.Tensor:
    lengths, starts = batch.context_lens.tolist(), batch.query_starts
    _, slots = sequences_of(lengths, np.diff(starts).tolist())
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths)
    k, v = random(2, num_blocks, 2, BLOCK_SIZE, head_dim, seed=1).to(dtype)
    q = random(int(starts[-1]), 4, head_dim, seed=2).to(dtype)
    new = random(2, int(starts[-1]), 2, head_dim, seed=4).to(dtype)
    there = batch.to(tensor_of)
    return ops.attend((q, *new), PagedKv(k, v), tensor_of(slots), there, window)


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("window", [None, 20])
def test_attention_is_torchs(
    head_dim: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several parts of positions, drafts behind a row, and a prompt in one batch."""
    monkeypatch.setattr(triton_attention, "SPLIT", 64)
    batch, _ = sequences_of([150, 5, 64, 40], [1, 5, 3, 20])
    expected = attended(torch_ops, torch.float32, head_dim, window, batch)
    result = attended(cuda_ops, torch.float32, head_dim, window, batch)
    torch.testing.assert_close(result, expected)
    # As near to it in bfloat16 as torch's.
    narrow = attended(cuda_ops, torch.bfloat16, head_dim, window, batch)
    in_torch = attended(torch_ops, torch.bfloat16, head_dim, window, batch)
    assert (narrow - expected).norm() <= 1.5 * (in_torch - expected).norm()


def test_a_fault_in_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where the last part of the positions is left out."""
    batch, _ = sequences_of([150], [1])
    expected = attended(torch_ops, torch.float32, 16, None, batch)
    monkeypatch.setattr(triton_attention, "SPLIT", 64)
    torch.testing.assert_close(attended(cuda_ops, torch.float32, 16, None, batch), expected)
    monkeypatch.setattr(triton_attention.triton, "cdiv", lambda a, b: a // b)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(attended(cuda_ops, torch.float32, 16, None, batch), expected)


def test_a_rows_attention_does_not_depend_on_its_company() -> None:
    """Alone, beside another sequence, and with the same blocks: the same bits."""
    kv = random(2, 12, 2, BLOCK_SIZE, 16, seed=1)
    q, new = random(2, 4, 16, seed=2), random(2, 2, 2, 16, seed=4)
    results = []
    for count in (1, 2):
        tables = np.stack([np.arange(10), np.arange(10)[::-1] + 2])[:count].astype(np.int32)
        starts, lengths = np.arange(count + 1, dtype=np.int32), np.array([150, 20], np.int32)
        slots = torch.tensor([9 * BLOCK_SIZE + 5, 11 * BLOCK_SIZE + 3])[:count]
        cache, batch = PagedKv(*kv.clone()), SequenceBatch(starts, lengths[:count], tables)
        qkv = (q[:count], *new[:, :count])
        results.append(cuda_ops.attend(qkv, cache, slots, batch.to(tensor_of))[0])
    assert torch.equal(*results)


@each_dtype
def test_norm_and_rotary_are_torchs(dtype: torch.dtype) -> None:
    x, weight = random(3, 5, 24).to(dtype), random(24, seed=1).to(dtype)
    cos, sin = random(2, 3, 12, seed=2)
    norm = cuda_ops.CUDA.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(norm, torch_ops.rms_norm(x, weight, 1e-5))
    expected = torch_ops.apply_rotary(x, cos, sin)
    torch.testing.assert_close(cuda_ops.CUDA.apply_rotary(x.clone(), cos, sin), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(cuda_ops.CUDA.apply_rotary(x.clone(), sin, cos), expected)


def test_every_kernel_compiles_for_cards_that_are_not_here() -> None:
    """To machine code; and the rows of a product are summed up in one layout, however many."""
    environment = {name: one for name, one in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.cuda.compile_kernels", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert all(one["code_bytes"] > 0 for one in report.values())
    for fmt in PackedFormat:
        for kind in ("fp32", "bf16"):
            rows = [report[f"sm_90 linear_rows {fmt} {kind} {count}"] for count in (1, 2, 4)]
            assert all(len(one["reduced_in"]) == 1 for one in rows)
            assert len({one["reduced_in"][0] for one in rows}) == 1
