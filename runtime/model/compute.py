"""Where the model's modules compute a chunk of tokens, and the few operations that differ there.

Shapes: T new tokens, S cached and new tokens, A heads, E experts, k num_experts_per_tok.
"""

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
"""Attention scores computed at once: they stay in cache, and memory is bounded however long the context."""
GPU_SCORES_BYTES = 128 << 20
EXPANDED_BYTES = 512 << 20
"""Keys and values of as many heads as this holds are expanded at once on a GPU."""


class CpuProcessor:
    """Plain torch on the CPU."""

    device = torch.device("cpu")
    scores_bytes = CPU_SCORES_BYTES
    part_tokens = PART_TOKENS

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """See `Processor.route`."""
        return choose_experts(logits, bias, config)

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        """See `Processor.heads_at_once`: as many as have their scores computed at once."""
        return max(1, self.scores_bytes // (4 * count * total))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """See `Processor.attend`."""
        return causal_attention(query, keys, values, scale, self.scores_bytes)


class GpuProcessor:
    """A GPU (or its stand-in): the router's kernel, and attention through torch's fused one."""

    scores_bytes = GPU_SCORES_BYTES
    part_tokens = sys.maxsize

    def __init__(self, device: torch.device, ops: Ops) -> None:
        self.device = device
        self._ops = ops

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """See `Processor.route`."""
        return self._ops.route(logits, bias, config)

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        """See `Processor.heads_at_once`: as many as `EXPANDED_BYTES` hold in bf16."""
        return max(1, EXPANDED_BYTES // (2 * total * width))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """See `Processor.attend`; values are padded to the keys' width, which the flash kernel wants."""
        width = values.shape[-1]
        values = F.pad(values, (0, keys.shape[-1] - width))
        mask = causal_lower_right(query.shape[1], keys.shape[1])
        mixed = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=scale
        )
        return mixed[0, ..., :width]


CPU = CpuProcessor()
