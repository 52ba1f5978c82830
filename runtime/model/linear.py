"""Matrix products of the backbone: bias-free `Linear`, and bf16 products that stay fast on older CPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.kernels import cpu

WIDE_FROM_ROWS = 8
"""Rows from which converting a bf16 operand to fp32 pays, where bf16 is not native."""
WIDE_TO_ELEMENTS = 1 << 16
"""Below so many elements it pays whatever the rows: setting a bf16 product up takes longer."""
WIDE_WEIGHT_FROM_ROWS = 16
"""The same for weights, which are larger."""
_BLOCK_ELEMENTS = 1 << 22


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    return not {"avx512bf16", "amx"}.isdisjoint(cpu.isa_paths())


def slow_bf16(operand: Tensor) -> bool:
    """Whether bf16 products of this operand run on a CPU that has no instructions for them."""
    return operand.device.type == "cpu" and not native_bf16()


def widen(rows: int, operand: Tensor) -> Tensor:
    """The right operand of a product with so many rows on the left, as fp32 where that is faster.

    Without bf16 instructions oneDNN's bf16 product runs at a quarter of the fp32 one (measured on
    Skylake-SP: 25 against 105 GFLOP/s a core); with them the operand comes back unchanged.
    """
    if not slow_bf16(operand) or (rows < WIDE_FROM_ROWS and operand.numel() > WIDE_TO_ELEMENTS):
        return operand
    return operand.float()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a [A, T, K] @ b [A, K, N]`, in b's dtype or wider."""
    b = widen(a.shape[1], b)
    return torch.bmm(a.type(b.dtype), b)


class Linear(nn.Linear):
    """`x [T, in] -> [T, out]` without bias, in the dtype of `x`; `weight` is [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the transposed weight; same result within rounding whichever way it runs."""
        if x.shape[0] < WIDE_WEIGHT_FROM_ROWS or x.dtype == torch.float32 or not slow_bf16(x):
            return F.linear(x, self.weight)
        return _wide_linear(x.float(), self.weight).to(x.dtype)

    __call__ = forward  # no hooks


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32, converting a block of rows of the weight at a time: blocks stay in cache."""
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    starts = range(0, weight.shape[0], step)
    return torch.cat([F.linear(x, weight[start : start + step].float()) for start in starts], dim=1)
