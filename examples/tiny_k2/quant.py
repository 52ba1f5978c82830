"""The two roundings of this model: FP8 in 128x128 blocks (as published), INT4 in groups of 32 (as run)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK, GROUP, FP8_MAX = 128, 32, 448.0
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")
"""Parts of names that K2 leaves in bf16 or wider."""


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., out, in] -> float8_e4m3fn values and float32 scales [..., ceil(out/128), ceil(in/128)]."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scale = blocks.abs().amax((-3, -1)).clamp(min=1e-12) / FP8_MAX
    values = (weight.float() / _spread(scale, rows, columns)).clamp(-FP8_MAX, FP8_MAX)
    return values.to(torch.float8_e4m3fn), scale


def from_fp8(values: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `to_fp8`: float32."""
    return values.float() * _spread(scale, *values.shape[-2:])


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    scale = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return scale[..., :rows, :columns]


def round_int4(weight: Tensor) -> Tensor:
    """[..., in] -> float32 nearest values q * scale, q in -8..7, one bf16 scale per 32 inputs."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    best, error = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for shrink in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = (largest * shrink).bfloat16().float()
        rounded = (groups / scale).round().clamp(-8, 7) * scale
        now = (rounded - groups).square().sum(-1, keepdim=True)
        best, error = torch.where(now < error, rounded, best), torch.minimum(now, error)
    return best.flatten(-2)


def rounded(name: str, weight: Tensor, int4: bool = True) -> Tensor:
    """The values, float32, to which `weight` is rounded when the model runs."""
    if weight.dim() < 2 or any(part in name for part in KEPT):
        return weight.bfloat16().float()
    if int4 and ".experts." in name:
        return round_int4(weight)
    return from_fp8(*to_fp8(weight))


@contextmanager
@torch.no_grad()
def quantized(model: nn.Module, int4: bool = True) -> Iterator[None]:
    """Round the model's weights within the block; its gradients are applied to the unrounded weights."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = rounded(name, parameter.data, int4)
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]
