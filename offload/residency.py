"""Which expert holds which slot or row, and how fast a use is forgotten."""

from __future__ import annotations

from moebox._kernels import HALF_LIFE_TOKENS, Residency

__all__ = ["HALF_LIFE_TOKENS", "Residency"]
