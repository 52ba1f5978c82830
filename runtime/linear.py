"""Matrix products of the backbone: bias-free `Linear`, and bf16 products that stay fast on older CPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.kernels import cpu

WIDE_FROM_ROWS = 24
"""Rows from which converting bf16 operands to fp32 costs less than multiplying without bf16 instructions."""


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    return not {"avx512bf16", "amx"}.isdisjoint(cpu.isa_paths())


def widen(rows: int, *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands, as fp32 where a product with so many rows is faster that way.

    Without bf16 instructions oneDNN's bf16 product runs at a quarter of the fp32 one (measured on
    Skylake-SP: 25 against 105 GFLOP/s a core); with them the operands come back unchanged.
    """
    if native_bf16() or rows < WIDE_FROM_ROWS:
        return operands
    return tuple(operand.float() for operand in operands)


class Linear(nn.Linear):
    """`x [T, in] -> [T, out]` without bias, in the dtype of `x`; `weight` is [out, in]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the transposed weight; same result within rounding whichever way it runs."""
        wide, weight = widen(x.shape[0], x, self.weight)
        return F.linear(wide, weight).to(x.dtype)


def softmax(scores: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension in fp32; `mask` is True where a score does not count."""
    scores = scores.float() * scale
    if mask is not None:
        scores = scores.masked_fill_(mask, float("-inf"))
    return torch.softmax(scores, dim=-1)
