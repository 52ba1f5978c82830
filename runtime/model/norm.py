"""RMSNorm (arXiv 1910.07467). The family has two epsilons: the config's, and one for latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LATENT_EPS = 1e-6
"""Epsilon of `q_a_layernorm` and `kv_a_layernorm`: transformers' class default, not `rms_norm_eps`."""


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` in fp32, returned in `dtype`; `weight` is fp32 [width]."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)
        self.dtype = dtype
        self.root_width = width**0.5
        self.eps = eps
        self.least_norm = torch.tensor((width * eps) ** 0.5, device=device)
        self.zero = torch.zeros((), device=device)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, width]`, any float dtype -> [T, width].

        sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(width * eps)) / sqrt(width). This takes half as many passes
        over x as `F.rms_norm`, and a fifth of the time.
        """
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        norm = torch.hypot(norm, self.least_norm)
        return torch.addcdiv(self.zero, x, norm, value=self.root_width).mul_(self.weight).type(self.dtype)

    __call__ = forward  # without torch's hooks, which take a fifth of a small norm's time
