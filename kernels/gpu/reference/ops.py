"""`Ops` in plain torch."""

from __future__ import annotations

from moebox.kernels.gpu.reference.attention import absorb, latents, mla_decode, value_up
from moebox.kernels.gpu.reference.dense import combine_norm, gemv, silu_mul
from moebox.kernels.gpu.reference.experts import experts_many, experts_one, split_expert
from moebox.kernels.gpu.reference.router import predict, route, route_and_post
from moebox.kernels.gpu.reference.signals import post, wait

__all__ = [
    "absorb",
    "combine_norm",
    "experts_many",
    "experts_one",
    "gemv",
    "latents",
    "mla_decode",
    "post",
    "predict",
    "route",
    "route_and_post",
    "silu_mul",
    "split_expert",
    "value_up",
    "wait",
]
