"""`Ops` in Triton."""

from __future__ import annotations

from moebox.kernels.gpu.triton.attention import absorb, latents, mla_decode, value_up
from moebox.kernels.gpu.triton.dense import combine_norm, gemv, silu_mul
from moebox.kernels.gpu.triton.experts import experts_many, experts_one
from moebox.kernels.gpu.triton.router import predict, route, route_and_post
from moebox.kernels.gpu.triton.signals import post, wait
from moebox.kernels.gpu.triton.split_expert import split_expert

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
