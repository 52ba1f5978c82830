"""Feed-forward parts of a layer: the dense gated MLP, and the mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.offload.experts import Experts
from moebox.runtime.model.linear import Linear
from moebox.runtime.model.router import Router

if TYPE_CHECKING:
    from moebox.runtime.model.base import Processor


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`: the dense layers' MLP and the shared expert.

    `gate_up_proj` holds the rows of `gate_proj`, then those of `up_proj`.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, H] -> [T, H]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MoE(nn.Module):
    """Routed experts, wherever they lie, plus the shared expert.

    Attributes:
        layer: index of the decoder layer.
        experts: computes the routed experts; set by `KimiK2.connect`.
    """

    experts: Experts

    def __init__(self, config: ModelConfig, layer: int, processor: Processor) -> None:
        super().__init__()
        self.layer = layer
        self.gate = Router(config, processor)
        self.shared_experts = (
            MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts `[t, H]` of a chunk of T tokens -> fp32 [T, H]."""
        expert_ids, weights = (joined(choices) for choices in zip(*map(self.gate, parts), strict=True))
        routed = self.experts.forward(self.layer, expert_ids, weights, joined(parts))
        if self.shared_experts is not None:
            for out, part in zip(torch.split(routed, [len(part) for part in parts]), parts, strict=True):
                out.add_(self.shared_experts(part))
        return routed


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
