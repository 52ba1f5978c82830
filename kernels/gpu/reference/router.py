"""The router in plain torch. `base.Ops` documents the functions. Shapes: T tokens, E n_routed_experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.kernels.gpu.base import RouterSpec
from moebox.kernels.gpu.reference.signals import post


def route(logits: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
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
    mailbox_ids: Tensor,
    mailbox_weights: Tensor,
    mailbox_hidden: Tensor,
    flag: Tensor,
) -> None:
    ids, weights = route(logits[None], bias, spec)
    post(ids[0], weights[0], hidden, mailbox_ids, mailbox_weights, mailbox_hidden, flag)


def predict(logits: Tensor, bias: Tensor, spec: RouterSpec, mailbox_ids: Tensor, flag: Tensor) -> None:
    mailbox_ids.copy_(route(logits[None], bias, spec)[0][0])
    flag[0] = 1
