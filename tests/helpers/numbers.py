"""Errors of tensors."""

from __future__ import annotations

from torch import Tensor


def relative_l2(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|` in fp64; NaN if either tensor has a NaN."""
    result, expected = result.double().cpu(), expected.double().cpu()
    return float((result - expected).norm() / expected.norm())
