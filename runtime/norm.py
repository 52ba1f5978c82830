"""RMSNorm (arXiv 1910.07467), with the two epsilons of the family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_EPS = 1e-6
"""Epsilon of `q_a_layernorm` and `kv_a_layernorm`: transformers' class default, not `rms_norm_eps`."""


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`: computed in fp32, returned in `dtype`; `weight` is fp32 [width]."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)
        self.eps = eps
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, width]`, any float dtype -> [T, width]."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(self.dtype)
