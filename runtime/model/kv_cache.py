"""The compressed cache of latent attention: one vector for each token and layer, and the tokens' ids."""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.config import ModelConfig

FIRST_CAPACITY = 256
"""Tokens for which the first allocation has room."""


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in all layers."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class KVCache:
    """For each layer [capacity, kv_lora_rank + qk_rope_head_dim]: the normed latent, then the rotated key.

    A forward pass appends its tokens' values layer by layer, and calls `commit` at its end. A pass that is
    interrupted before that leaves the cache as it was.

    Args:
        config: the model's.
        dtype: of the values.
        limit: tokens that the cache may hold.
        layers: memory for all of them, one tensor for each layer; None: memory grows with the tokens.

    Attributes:
        tokens: ids of the committed tokens.
        layers: one tensor for each layer.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, limit: int, layers: list[Tensor] | None = None
    ) -> None:
        self.tokens: list[int] = []
        self.limit = limit
        self._width = config.kv_lora_rank + config.qk_rope_head_dim
        self.layers = layers or [
            torch.empty(0, self._width, dtype=dtype) for _ in range(config.num_hidden_layers)
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, in use or not."""
        return sum(layer.nbytes for layer in self.layers)

    def append(self, layer: int, values: Tensor, written: int = 0) -> Tensor:
        """Write `values [T, width]` behind the committed tokens and the `written` tokens of this pass.

        Returns:
            The layer's values so far, [len(self) + written + T, width].
        """
        start = len(self.tokens) + written
        end = start + values.shape[0]
        if end > self.layers[layer].shape[0]:
            self._grow(layer, start, end)
        cached = self.layers[layer][:end]
        cached[start:] = values
        return cached

    def commit(self, token_ids: list[int]) -> None:
        """Add `token_ids` to the tokens, after every layer has appended their values."""
        self.tokens.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens; the memory of the others stays allocated."""
        del self.tokens[length:]

    def _grow(self, layer: int, held: int, needed: int) -> None:
        capacity = max(needed, min(2 * needed, self.limit), min(FIRST_CAPACITY, self.limit))
        old = self.layers[layer]
        grown = old.new_empty(capacity, self._width)
        grown[:held] = old[:held]
        self.layers[layer] = grown
