"""Muon (Jordan et al. 2024; Moonshot's K2 was trained with it) for matrices, AdamW for the rest."""

from collections import defaultdict

import torch
from torch import Tensor, nn

ADAMW_PARTS = ("embed_tokens", "lm_head", "mlp.gate.", "norm")
"""AdamW trains the parameters whose names contain one of these: embeddings, head, router, norms."""


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz on a batch [n, rows, columns]: singular values towards 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised steps; equal shapes are done in one batch."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": 0.02})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step(parameters, **{key: group[key] for key in ("lr", "momentum", "weight_decay")})

    def _step(self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        grads = torch.stack([parameter.grad for parameter in parameters])
        moved = self.state[parameters[0]].setdefault("momentum", torch.zeros_like(grads))
        moved.lerp_(grads, 1 - momentum)
        ahead = grads.lerp(moved, momentum).flatten(0, -3)
        scale = max(1.0, ahead.shape[-2] / ahead.shape[-1]) ** 0.5
        steps = orthogonalise(ahead).view_as(grads).to(grads.dtype)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(steps.unbind()), alpha=-lr * scale)


def optimizers(model: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Both optimizers, each group with its `peak` learning rate for the schedule."""
    named = list(model.named_parameters())
    others = [parameter for name, parameter in named if any(part in name for part in ADAMW_PARTS)]
    matrices = [parameter for name, parameter in named if not any(part in name for part in ADAMW_PARTS)]
    fused = others[0].is_cuda
    both = [Muon(matrices, muon_lr),
            torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)]  # fmt: skip
    for optimizer in both:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return both
