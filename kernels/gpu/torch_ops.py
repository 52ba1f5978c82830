"""`Ops` in plain torch."""

from __future__ import annotations

from typing import Any

from moebox.kernels.gpu.reference import (
    absorb,
    combine_norm,
    gemv,
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
    "experts_many",
    "experts_one",
    "gemv",
    "latents",
    "mla_decode",
    "post",
    "route",
    "route_and_post",
    "silu_mul",
    "value_up",
    "wait",
]


def __getattr__(name: str) -> Any:  # until the experts' reference is there
    if name in ("experts_one", "experts_many"):
        from moebox.kernels.gpu import experts_reference

        return getattr(experts_reference, name)
    raise AttributeError(name)
