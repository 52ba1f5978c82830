"""The compressed cache of latent attention: one vector per token and layer, and the tokens it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.config import ModelConfig

FIRST_CAPACITY = 256


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in all layers."""
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize


class KVCache:
    """Per layer [capacity, kv_lora_rank + qk_rope_head_dim]: the normed latent, then the rotated key.

    `tokens` says what the cache holds. A forward pass first writes behind them, layer by layer; only
    `commit` makes the new tokens count. A pass that is interrupted leaves the cache as it was.

    Memory grows with the tokens, up to `limit` of them, unless `layers` bring their own.
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
        """Write `values [T, width]` behind the committed tokens and the `written` ones of this pass.

        Returns the layer's [len + written + T, width].
        """
        start = len(self.tokens) + written
        end = start + values.shape[0]
        if end > self.layers[layer].shape[0]:
            self._grow(layer, start, end)
        cached = self.layers[layer][:end]
        cached[start:] = values
        return cached

    def commit(self, token_ids: list[int]) -> None:
        """Count `token_ids` as held, after every layer has appended their values."""
        self.tokens.extend(token_ids)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; their memory is kept for those that follow."""
        del self.tokens[length:]

    def _grow(self, layer: int, held: int, needed: int) -> None:
        capacity = max(needed, min(2 * needed, self.limit), min(FIRST_CAPACITY, self.limit))
        old = self.layers[layer]
        grown = old.new_empty(capacity, self._width)
        grown[:held] = old[:held]
        self.layers[layer] = grown
