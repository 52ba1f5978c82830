"""What the GPU kernels compute, in plain torch: their tests' yardstick, and the stand-in GPU's kernels.

Shapes: H hidden_size, A heads, R kv_lora_rank, P qk_rope_head_dim, Q query width, C cache capacity, S tokens
in the cache, E n_routed_experts, k num_experts_per_tok, T tokens. One token unless T says otherwise.
`Ops` in `ops.py` documents every function; products and sums here are fp32 whatever the operands.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20
"""Weights converted to fp32 at once: the block stays in cache."""


class RouterSpec(Protocol):
    """The router's settings; a `ModelConfig` has them."""

    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def n_group(self) -> int: ...
    @property
    def topk_group(self) -> int: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def routed_scaling_factor(self) -> float: ...


def wait(flag: Tensor) -> None:
    """See `Ops.wait`."""
    while not flag[0].item():
        time.sleep(0)


def post(
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    box_ids: Tensor,
    box_weights: Tensor,
    box_hidden: Tensor,
    flag: Tensor,
) -> None:
    """See `Ops.post`."""
    box_ids.copy_(ids)
    box_weights.copy_(weights)
    box_hidden.copy_(hidden)
    flag[0] = 1  # last: whoever sees it may read the box


def combine_norm(
    x: Tensor, terms: Sequence[Tensor], weight: Tensor, eps: float, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """See `Ops.combine_norm`."""
    for term in terms:
        x += term
    return _norm(x, weight, eps).type(out_dtype)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean() + eps) * weight


def gemv(x: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """See `Ops.gemv`."""
    wide = x.float()
    step = max(1, _BLOCK_ELEMENTS // w.shape[1])
    sums = [torch.mv(w[start : start + step].float(), wide) for start in range(0, w.shape[0], step)]
    return torch.cat(sums).type(out_dtype or w.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Ops.silu_mul`."""
    gate, up = gate_up.float().chunk(2)
    return (F.silu(gate) * up).type(gate_up.dtype)


def latents(
    q_kv: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    rotations: Tensor,
    position: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """See `Ops.latents`."""
    rank, rope = kv_weight.shape[0], 2 * rotations.shape[2]
    width = q_kv.shape[0] - rank - rope
    query, latent, key = q_kv[:width], q_kv[width:-rope], q_kv[-rope:]
    entry = torch.cat([_norm(latent, kv_weight, eps), rotate(key, rotations, position)])
    cache[int(position)] = entry.type(cache.dtype)
    return query if q_weight is None else _norm(query, q_weight, eps).type(q_kv.dtype)


def rotate(x: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
    """Rotate the pairs `(x[2j], x[2j + 1])` of `x [..., P]` for a position: fp32 [..., P]."""
    cos, sin = rotations[:, int(position)]
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def absorb(q: Tensor, kv_b: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
    """See `Ops.absorb`."""
    rope = 2 * rotations.shape[2]
    per_head = q.view(kv_b.shape[0], -1)
    nope = per_head.shape[1] - rope
    latent = torch.bmm(per_head[:, None, :nope].float(), kv_b[:, :nope].float())[:, 0]
    return torch.cat([latent, rotate(per_head[:, nope:], rotations, position)], dim=1).type(q.dtype)


def mla_decode(q: Tensor, cache: Tensor, position: Tensor, scale: float, rank: int) -> Tensor:
    """See `Ops.mla_decode`."""
    seen = cache[: int(position) + 1].float()
    return torch.softmax(q.float() @ seen.T * scale, dim=-1) @ seen[:, :rank]


def value_up(o: Tensor, kv_b: Tensor, v_head_dim: int) -> Tensor:
    """See `Ops.value_up`."""
    values = kv_b[:, kv_b.shape[1] - v_head_dim :].float()
    return torch.bmm(values, o.float()[:, :, None]).flatten().type(kv_b.dtype)


def route(logits: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """See `Ops.route`."""
    scores = logits.sigmoid()
    ids = _mask_groups(scores + bias, spec).topk(spec.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(1, ids)
    if spec.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * spec.routed_scaling_factor


def _mask_groups(choice: Tensor, spec: RouterSpec) -> Tensor:
    """-inf outside the `topk_group` groups whose two best experts score highest: [T, E]."""
    if spec.n_group == 1:
        return choice
    groups = choice.view(choice.shape[0], spec.n_group, -1)
    group_scores = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(dim=-1)
    kept = group_scores.topk(spec.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    masked: Tensor = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
    return masked


def route_and_post(
    logits: Tensor,
    bias: Tensor,
    spec: RouterSpec,
    hidden: Tensor,
    box_ids: Tensor,
    box_weights: Tensor,
    box_hidden: Tensor,
    flag: Tensor,
) -> None:
    """See `Ops.route_and_post`."""
    ids, weights = route(logits[None], bias, spec)
    post(ids[0], weights[0], hidden, box_ids, box_weights, box_hidden, flag)


def guess(logits: Tensor, bias: Tensor, spec: RouterSpec, box_ids: Tensor, flag: Tensor) -> None:
    """See `Ops.guess`."""
    box_ids.copy_(route(logits[None], bias, spec)[0][0])
    flag[0] = 1
