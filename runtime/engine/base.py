"""The interface of a runner: what the engine asks of a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moebox.offload.traffic import Traffic
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.kv_cache import KVCache


class Runner(Protocol):
    """Runs a loaded model, wherever its weights are.

    Attributes:
        model: the backbone's modules.
        dtype: what they compute in.
        chunk_tokens: tokens that go through the model at once.
    """

    model: KimiK2
    dtype: torch.dtype
    chunk_tokens: int

    def new_cache(self, context: int) -> KVCache:
        """An empty cache for up to `context` tokens.

        Raises:
            RequestError: there is no memory left for it.
        """
        ...

    def forward(
        self,
        token_ids: list[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run tokens that follow the cache, and commit them to it when they are done.

        Args:
            token_ids: 1 to `chunk_tokens` ids.
            cache: made by `new_cache`.
            last_only: only the last token's logits are wanted.
            between_layers: called before each layer, or before the only step of a runner that cannot stop
                between layers; what it raises ends the pass.

        Returns:
            fp32 [T, vocab_size] on the CPU, or [1, vocab_size] of the last.
        """
        ...

    def traffic(self) -> Traffic:
        """Where experts were found and what moved since loading began; differences count."""
        ...

    def close(self) -> None:
        """End reads, and save what was learned of the routing; nothing is computed afterwards."""
        ...
