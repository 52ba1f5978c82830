"""`Ops` in Triton."""

from __future__ import annotations

from moebox.kernels.gpu.triton.attention import absorb, latents, mla_decode, value_up
from moebox.kernels.gpu.triton.dense import combine_norm, gemv, silu_mul
from moebox.kernels.gpu.triton.experts import experts_many, experts_one
from moebox.kernels.gpu.triton.part import expert_part
from moebox.kernels.gpu.triton.router import guess, route, route_and_post
from moebox.kernels.gpu.triton.signals import post, wait

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
