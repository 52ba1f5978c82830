"""What the next layers will probably pick: their own routers, asked with this layer's state.

A layer adds little to the residual stream, so the next router sees nearly what this one has seen. On
3,611 tokens of dialogues, answers read in as a prompt, the k likeliest experts of tiny-k2 are 78 % of the
next layer's picks, and 67 % of those one layer on; of the picks that a cache of half the experts does not
hold, 74 and 62 %. The norms' ratio, the shared expert's output, the scores' mean difference and
statistics of which expert follows which gain at most 0.6 points of the latter one layer ahead, and 1.6
two layers ahead. A linear map that is fitted to the states gains 4 and 6, but has to be learned for each
model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from moebox.offload.prefetch.prefetch import LAYERS_AHEAD
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.mlp import MoE
from moebox.runtime.model.router import Router, mask_groups

NAMED = 2
"""Experts that are named, over those that a layer picks: the further ones are seldom picked."""


class GateLookahead:
    """Implements `offload.prefetch.Predictor` with the routers of a loaded model."""

    def __init__(self, model: KimiK2) -> None:
        self.config = model.config
        self._gates = [layer.mlp.gate for layer in model.model.layers if isinstance(layer.mlp, MoE)]
        self._count = min(NAMED * self.config.num_experts_per_tok, self.config.n_routed_experts)

    def predict(self, moe: int, hidden: Tensor) -> Iterator[tuple[int, list[int]]]:
        """See `Predictor.predict`; `hidden` [1, H] of any float type."""
        state = hidden.float()
        gates = self._gates[moe + 1 : moe + 1 + LAYERS_AHEAD]
        for ahead, gate in enumerate(gates, 1):
            yield ahead, self._likeliest(gate, state)

    def _likeliest(self, gate: Router, state: Tensor) -> list[int]:
        scores = F.linear(state, gate.weight).sigmoid_().add_(gate.e_score_correction_bias)
        chosen: list[int] = mask_groups(scores, self.config)[0].topk(self._count).indices.tolist()
        return chosen
