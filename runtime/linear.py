"""Matrix products of the backbone: bias-free `Linear`, and bf16 products that stay fast on older CPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.kernels import cpu

WIDE_FROM_ROWS = 8
"""Rows from which converting both bf16 operands to fp32 pays, where bf16 is not native."""
WIDE_TO_ELEMENTS = 1 << 16
"""Below so many elements it pays whatever the rows: setting a bf16 product up takes longer."""
WIDE_WEIGHT_FROM_ROWS = 16
"""The same for weights, which are larger."""
_BLOCK_ELEMENTS = 1 << 22


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    return not {"avx512bf16", "amx"}.isdisjoint(cpu.isa_paths())


def widen(rows: int, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands, as fp32 where a product with so many rows is faster that way.

    Without bf16 instructions oneDNN's bf16 product runs at a quarter of the fp32 one (measured on
    Skylake-SP: 25 against 105 GFLOP/s a core); with them the operands come back unchanged.
    """
    if native_bf16() or (
        rows < WIDE_FROM_ROWS and sum(operand.numel() for operand in operands) > WIDE_TO_ELEMENTS
    ):
        return operands
    return tuple(operand.float() for operand in operands)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a [A, T, K] @ b [A, K, N]`, in a's dtype or wider."""
    wide_a, wide_b = widen(a.shape[1], a, b)
    return wide_a @ wide_b


class Linear(nn.Linear):
    """`x [T, in] -> [T, out]` without bias, in the dtype of `x`; `weight` is [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the transposed weight; same result within rounding whichever way it runs."""
        if x.shape[0] < WIDE_WEIGHT_FROM_ROWS or x.dtype == torch.float32 or native_bf16():
            return F.linear(x, self.weight)
        return _wide_linear(x.float(), self.weight).to(x.dtype)


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32, converting a block of rows of the weight at a time: blocks stay in cache."""
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    starts = range(0, weight.shape[0], step)
    return torch.cat([F.linear(x, weight[start : start + step].float()) for start in starts], dim=1)
