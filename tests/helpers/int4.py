"""Helpers for tests of the INT4 quantizer: weights like those of models, and slow exact references."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moebox.config import GROUP_SIZE

BLOCK = 128


def random_weights(rows: int, columns: int, seed: int = 0, *, tails: float | None = None) -> torch.Tensor:
    """float32 [rows, columns], std 0.02: normal, or Student's t with `tails` degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator)
    if tails is not None:
        chi2 = sum(torch.randn(rows, columns, generator=generator) ** 2 for _ in range(round(tails)))
        weights *= (tails / chi2).sqrt()
    return weights * 0.02


def fp8_blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 values and scale_inv of 128 x 128 blocks, partial ones at the edges."""
    rows, columns = (math.ceil(size / BLOCK) for size in weights.shape)
    scale = torch.ones(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = weights[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scale[i, j] = block.abs().max().clamp_min(1e-20) / 448
    return (weights / expand_blocks(scale, weights.shape)).to(torch.float8_e4m3fn), scale


def expand_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """scale_inv [ceil(out/128), ceil(in/128)] as one factor per weight."""
    full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return full[: shape[0], : shape[1]]


def group_errors(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Squared error per group with the best values -8..7 for `scale` [out, in/32]; all float64."""
    groups = weights.double().view(*scale.shape, GROUP_SIZE)
    factor = scale.double()[:, :, None]
    return ((groups - (groups / factor).round().clamp(-8, 7) * factor) ** 2).sum(-1)


def least_errors(weights: torch.Tensor) -> torch.Tensor:
    """The least squared error per group that any bf16 scale reaches, by trying them all (both signs)."""
    groups = weights.view(weights.shape[0], -1, GROUP_SIZE)
    largest = groups.abs().amax(-1)
    least = (groups.double() ** 2).sum(-1)
    # Between amax/16 and amax/4 every mantissa of bf16, walked through its bits.
    start = (largest / 16).bfloat16().view(torch.int16)
    for step in range(2 * 128 + 2):
        scale = (start + step).view(torch.bfloat16)
        for signed in (scale, -scale):
            least = torch.minimum(least, group_errors(weights, signed))
    return least


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Load a checkpoint's tensors, let `edit` change the dict, and store it as one file without index."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    edit(tensors)
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
