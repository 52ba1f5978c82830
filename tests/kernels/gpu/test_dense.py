"""Norms and matrix times vector against fp64 and the references."""

from __future__ import annotations

import pytest
import torch

from helpers.numbers import relative_l2
from moebox.kernels.gpu.reference import ops as reference
from moebox.kernels.gpu.triton import dense


@pytest.mark.parametrize("shape", [(1, 1), (7, 96), (13, 1000), (6, 5000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemv(shape, dtype, device):
    n, k = shape
    x, w = torch.randn(k).bfloat16().to(device), torch.randn(n, k).to(device, dtype)
    expected = w.double() @ x.double()
    assert relative_l2(dense.gemv(x, w, torch.float32), expected) < 1e-6
    rounded = dense.gemv(x, w)
    assert rounded.dtype == dtype
    assert relative_l2(rounded, expected) < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(2112, 7168), (12288, 1536), (7168, 8192), (7168, 2048)])
def test_gemv_of_k2(shape, device):
    n, k = shape
    x, w = torch.randn(k, device=device).bfloat16(), torch.randn(n, k, device=device).bfloat16()
    assert relative_l2(dense.gemv(x, w, torch.float32), w.double() @ x.double()) < 1e-6


@pytest.mark.parametrize("width", [96, 256, 7168])
@pytest.mark.parametrize("n_terms", range(5))
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_combine_norm(width, n_terms, out_dtype, device):
    dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
    x, weight = torch.randn(width, device=device), torch.rand(width, device=device)
    terms = [torch.randn(width, device=device).type(dtype) for dtype in dtypes[:n_terms]]
    before = x.clone()
    expected = reference.combine_norm(before, terms, weight, 1e-5, torch.float32)
    y = dense.combine_norm(x, terms, weight, 1e-5, out_dtype)
    assert torch.equal(x, before)  # the terms in the same order
    assert y.dtype == out_dtype
    assert relative_l2(y, expected) < (1e-6 if out_dtype == torch.float32 else 3e-3)


def test_combine_norm_has_the_epsilon(device):
    x, weight = torch.full((96,), 1e-3, device=device), torch.ones(96, device=device)
    y = dense.combine_norm(x, [], weight, 3e-6, torch.float32)
    torch.testing.assert_close(y.cpu(), torch.full((96,), 0.5))


@pytest.mark.parametrize("width", [1, 112, 700])
def test_silu_mul(width, device):
    gate_up = (3 * torch.randn(2 * width)).bfloat16().to(device)
    out = dense.silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2)
    assert out.dtype == torch.bfloat16
    assert relative_l2(out, gate * torch.sigmoid(gate) * up) < 3e-3
