"""The family's router: sigmoid scores, groups, top-k, and a bias that affects the choice, not the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.config import ModelConfig

if TYPE_CHECKING:
    from moebox.runtime.model.base import Processor


class Router(nn.Module):
    """Chooses k experts for each token (arXiv 2412.19437, section 2.1.2), in fp32.

    `weight` is [E, H], `e_score_correction_bias` [E].
    """

    def __init__(self, config: ModelConfig, processor: Processor) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.config = config
        self.processor = processor
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size), requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(torch.empty(experts), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x [T, H]` -> expert ids int64 [T, k] in any order, weights fp32 [T, k]."""
        logits = F.linear(x.float(), self.weight)
        return self.processor.route(logits, self.e_score_correction_bias, self.config)


def choose_experts(logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Choose the k experts with the largest `sigmoid(logit) + bias`; the weights leave the bias out.

    `logits` fp32 [T, E], `bias` fp32 [E] -> ids int64 [T, k], weights fp32 [T, k].
    """
    scores = logits.sigmoid()
    choice = mask_groups(scores + bias, config)
    ids = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


def mask_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """`choice [T, E]` with -inf outside the `topk_group` groups with the largest sums of two best experts."""
    if config.n_group == 1:
        return choice
    groups = choice.view(choice.shape[0], config.n_group, -1)
    group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    kept = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
    masked: Tensor = groups.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
    return masked
