"""Norms and matrix times vector in plain torch; sums are fp32. `base.Ops` documents the functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20
"""Weights that are converted to fp32 at a time: the block stays in the cache."""


def combine_norm(
    x: Tensor, terms: Sequence[Tensor], weight: Tensor, eps: float, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    for term in terms:
        x += term
    return norm(x, weight, eps).type(out_dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of a vector, fp32."""
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean() + eps) * weight


def gemv(x: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    wide = x.float()
    step = max(1, _BLOCK_ELEMENTS // w.shape[1])
    sums = [torch.mv(w[start : start + step].float(), wide) for start in range(0, w.shape[0], step)]
    return torch.cat(sums).type(out_dtype or w.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2)
    return (F.silu(gate) * up).type(gate_up.dtype)
