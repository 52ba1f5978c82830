"""`Ops` in plain torch."""

from __future__ import annotations

from moebox.kernels.gpu.experts_reference import expert_part, experts_many, experts_one
from moebox.kernels.gpu.reference import (
    absorb,
    combine_norm,
    gemv,
    guess,
    latents,
    mla_decode,
    post,
    route,
    route_and_post,
    silu_mul,
    value_up,
    wait,
)

__all__ = [
    "absorb",
    "combine_norm",
    "expert_part",
    "experts_many",
    "experts_one",
    "gemv",
    "guess",
    "latents",
    "mla_decode",
    "post",
    "route",
    "route_and_post",
    "silu_mul",
    "value_up",
    "wait",
]
