"""The interface of a processor: the few operations of the model's modules that differ between CPU and GPU.

Shapes: T new tokens, S cached and new tokens, A heads, E experts, k num_experts_per_tok.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moebox.config import ModelConfig


class Processor(Protocol):
    """A device, and the operations that are written for it.

    Attributes:
        device: holds parameters, caches and activations.
        scores_bytes: fp32 attention scores that are computed at once.
        part_tokens: tokens that go through a layer at once, the routed experts excepted. A longer chunk is
            computed as several such parts, and every bit of the result is that of the parts.
    """

    device: torch.device
    scores_bytes: int
    part_tokens: int

    def route(self, logits: Tensor, bias: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
        """Choose k experts for each token.

        `logits` fp32 [T, E], `bias` fp32 [E] -> expert ids int64 [T, k] in any order, weights fp32 [T, k].
        """
        ...

    def heads_at_once(self, count: int, total: int, width: int) -> int:
        """Heads whose keys and values are expanded at once.

        Args:
            count: T.
            total: S.
            width: elements that a head's keys and values take for each of the S tokens.
        """
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Causal attention of the last T of S tokens, where each head has its own keys and values.

        `query [A, T, D]`, `keys [A, S, D]`, `values [A, S, V]` -> [A, T, V].
        """
        ...
