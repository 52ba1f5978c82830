"""Which expert holds which slot or row, and how fast a use is forgotten."""

from __future__ import annotations

from moebox._kernels import Residency

__all__ = ["HALF_LIFE_TOKENS", "Residency"]

HALF_LIFE_TOKENS = 16.0
"""Half-life of an expert's score. On traces of a small model of the family 8 to 32 were best."""
