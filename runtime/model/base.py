"""The interface of a processor: the few operations of the model's modules that differ between CPU and GPU.

Shapes: T new tokens, S cached and new tokens, A heads, E experts, k num_experts_per_tok.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moebox.config import ModelConfig


class Processor(Protocol):
    """What the modules ask.

    Attributes:
        device: where parameters, caches and activations lie.
        scores_bytes: attention scores computed at once.
        part_tokens: tokens of a chunk that go through a layer at once, but for the routed experts: a longer
            chunk is computed as several of them, bit for bit.
    """

    device: torch.device
    scores_bytes: int
    part_tokens: int

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """`logits` fp32 [T, E], `bias` fp32 [E] -> expert ids int64 [T, k], weights fp32 [T, k]."""
        ...

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        """Heads whose keys and values, `width` elements a token, are expanded at once.

        `count` is T, `total` S.
        """
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Causal attention of the last T of S tokens, each head with keys and values of its own.

        `query [A, T, D]`, `keys [A, S, D]`, `values [A, S, V]` -> [A, T, V].
        """
        ...
