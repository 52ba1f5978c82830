"""`Ops` in plain torch."""

from __future__ import annotations

from moebox.kernels.gpu.reference.experts import expert_part, experts_many, experts_one
from moebox.kernels.gpu.reference.layer import (
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
