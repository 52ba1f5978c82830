"""Matrix products of the backbone: `Linear` without bias, and fp32 products on CPUs without bf16."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.kernels import cpu

WIDE_FROM_ROWS = 8
"""Rows of the left operand from which converting the right one from bf16 to fp32 saves time."""
WIDE_TO_ELEMENTS = 1 << 16
"""Elements of a right operand up to which converting it saves time for any number of rows, since a bf16
product takes longer to set up."""
WIDE_WEIGHT_FROM_ROWS = 16
"""Rows from which converting a weight saves time: weights have more elements than other operands."""
_BLOCK_ELEMENTS = 1 << 22
"""Elements of a weight that are converted at once, so that they stay in the CPU's cache."""


@cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX-512 BF16 or AMX)."""
    return not {"avx512bf16", "amx"}.isdisjoint(cpu.isa_paths())


def slow_bf16(operand: Tensor) -> bool:
    """Whether this operand lies in the memory of a CPU without instructions for bf16 products."""
    return operand.device.type == "cpu" and not native_bf16()


def widen(rows: int, operand: Tensor) -> Tensor:
    """The right operand of a product as fp32 where that is faster, else unchanged.

    Without bf16 instructions oneDNN's bf16 product runs at a quarter of the speed of the fp32 one (measured
    on Skylake-SP: 25 against 105 GFLOP/s a core).

    Args:
        rows: rows of the left operand.
        operand: the right operand.
    """
    if not slow_bf16(operand) or (rows < WIDE_FROM_ROWS and operand.numel() > WIDE_TO_ELEMENTS):
        return operand
    return operand.float()


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """`a [A, T, K] @ b [A, K, N]`, in b's dtype or wider."""
    b = widen(a.shape[1], b)
    return torch.bmm(a.type(b.dtype), b)


class Linear(nn.Linear):
    """A product with `weight [out, in]`, without bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, in] -> [T, out]`, in the dtype of `x`."""
        if x.shape[0] < WIDE_WEIGHT_FROM_ROWS or x.dtype == torch.float32 or not slow_bf16(x):
            return F.linear(x, self.weight)
        return _wide_linear(x.float(), self.weight).to(x.dtype)

    __call__ = forward  # without torch's hooks, which take time


def _wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product in fp32, converting one block of the weight's rows at a time."""
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    starts = range(0, weight.shape[0], step)
    return torch.cat([F.linear(x, weight[start : start + step].float()) for start in starts], dim=1)
