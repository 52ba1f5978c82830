"""The table of experts in slots or rows, and the half-life of their scores.

The rule of eviction is `Residency::weakest` in `csrc/residency/residency.cpp`; docs/policy.md explains it.
"""

from __future__ import annotations

from moebox._kernels import SCORE_HALF_LIFE_TOKENS, Residency

__all__ = ["SCORE_HALF_LIFE_TOKENS", "Residency"]
