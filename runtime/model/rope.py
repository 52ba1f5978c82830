"""Rotary positions (arXiv 2104.09864) with YaRN (arXiv 2309.00071), in the family's interleaved layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moebox.config import ModelConfig, YarnConfig


class Rotary:
    """Gives each position its rotations.

    A pair `(x[2j], x[2j+1])` is one complex number, which is rotated by the angle `position * inv_freq[j]`.
    transformers then separates even and odd elements, in queries and keys alike; this changes no score, and
    is left out here.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, config.yarn)
        self.inv_freq = frequencies.to(device)
        self.mscale = config.yarn.rotary_mscale() if config.yarn else 1.0

    def rotations(self, start: int, count: int) -> Tensor:
        """Rotations of the positions `start ... start + count`: complex64 [count, rope_dim / 2]."""
        positions = torch.arange(start, start + count, dtype=torch.float32, device=self.inv_freq.device)
        angles = torch.outer(positions, self.inv_freq)
        return torch.polar(torch.full_like(angles, self.mscale), angles)

    def tables(self, count: int) -> Tensor:
        """Cosines, then sines, of the positions below `count`: fp32 [2, count, rope_dim / 2]."""
        rotations = self.rotations(0, count)
        return torch.stack([rotations.real, rotations.imag])


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate `x [T, heads, rope_dim]` by `rotations [T, rope_dim / 2]`, in fp32, back in x's dtype."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations[:, None]).flatten(-2).type(x.dtype)


def inverse_frequencies(dim: int, theta: float, yarn: YarnConfig | None) -> Tensor:
    """Each pair's frequency in radians per position: fp32 [dim / 2].

    With YaRN the fast pairs keep their frequency, that of the slow ones is divided by `factor`, and a linear
    ramp lies between: `frequency * (ramp / factor + 1 - ramp)`.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if yarn is None:
        return frequencies
    low, high = correction_range(dim, theta, yarn)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn.factor * ramp + frequencies * (1 - ramp)


def correction_range(dim: int, theta: float, yarn: YarnConfig) -> tuple[float, float]:
    """The indices of the pairs between which YaRN's ramp rises from 0 to 1."""

    def pair_with(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    return low, high if high != low else high + 0.001
