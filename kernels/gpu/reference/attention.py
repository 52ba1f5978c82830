"""Latent attention of one token in plain torch; sums are fp32. `base.Ops` documents the functions.

Shapes: A heads, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.kernels.gpu.reference.dense import norm


def latents(
    q_kv: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    rotations: Tensor,
    position: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    rank, rope = kv_weight.shape[0], 2 * rotations.shape[2]
    width = q_kv.shape[0] - rank - rope
    query, latent, key = q_kv[:width], q_kv[width:-rope], q_kv[-rope:]
    entry = torch.cat([norm(latent, kv_weight, eps), rotate(key, rotations, position)])
    cache[int(position)] = entry.type(cache.dtype)
    return query if q_weight is None else norm(query, q_weight, eps).type(q_kv.dtype)


def rotate(x: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
    """Rotate the pairs `(x[2j], x[2j + 1])` of `x [..., P]` for a position: fp32 [..., P]."""
    cos, sin = rotations[:, int(position)]
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def absorb(q: Tensor, kv_b: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
    rope = 2 * rotations.shape[2]
    per_head = q.view(kv_b.shape[0], -1)
    nope = per_head.shape[1] - rope
    latent = torch.bmm(per_head[:, None, :nope].float(), kv_b[:, :nope].float())[:, 0]
    return torch.cat([latent, rotate(per_head[:, nope:], rotations, position)], dim=1).type(q.dtype)


def mla_decode(q: Tensor, cache: Tensor, position: Tensor, scale: float, rank: int) -> Tensor:
    seen = cache[: int(position) + 1].float()
    return torch.softmax(q.float() @ seen.T * scale, dim=-1) @ seen[:, :rank]


def value_up(o: Tensor, kv_b: Tensor, v_head_dim: int) -> Tensor:
    values = kv_b[:, kv_b.shape[1] - v_head_dim :].float()
    return torch.bmm(values, o.float()[:, :, None]).flatten().type(kv_b.dtype)
