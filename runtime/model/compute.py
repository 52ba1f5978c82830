"""The two processors: the operations of the model's modules that differ between CPU and GPU."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moebox.config import ModelConfig
from moebox.kernels.cpu import PART_TOKENS
from moebox.runtime.model.attention import causal_attention
from moebox.runtime.model.router import choose_experts

if TYPE_CHECKING:
    from moebox.kernels.gpu.base import Ops

CPU_SCORES_BYTES = 4 << 20
"""Attention scores computed at once: they stay in the CPU's cache, whatever the context's length."""
GPU_SCORES_BYTES = 128 << 20
EXPANDED_BYTES = 512 << 20
"""GPU memory for the keys and values of the heads that are expanded at once."""


class CpuProcessor:
    """Implements `Processor` with torch on the CPU."""

    device = torch.device("cpu")
    scores_bytes = CPU_SCORES_BYTES
    part_tokens = PART_TOKENS

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        return choose_experts(logits, bias, config)

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        return max(1, self.scores_bytes // (4 * count * total))  # fp32 scores

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        return causal_attention(query, keys, values, scale, self.scores_bytes)


class GpuProcessor:
    """Implements `Processor` on a GPU, or its stand-in, with the router's kernel and torch's fused attention.

    Args:
        device: the device's name for torch.
        ops: the device's operations.
    """

    scores_bytes = GPU_SCORES_BYTES
    part_tokens = sys.maxsize

    def __init__(self, device: torch.device, ops: Ops) -> None:
        self.device = device
        self._ops = ops

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        return self._ops.route(logits, bias, config)

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        return max(1, EXPANDED_BYTES // (2 * total * width))  # bf16

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        # The flash kernel takes values as wide as the keys.
        width = values.shape[-1]
        values = F.pad(values, (0, keys.shape[-1] - width))
        mask = causal_lower_right(query.shape[1], keys.shape[1])
        mixed = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=scale
        )
        return mixed[0, ..., :width]


CPU = CpuProcessor()
