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
    """Runs the passes of a loaded model, wherever its weights are.

    Attributes:
        model: the backbone's modules.
        dtype: the dtype in which they compute.
        chunk_tokens: the most tokens that `forward` takes.
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
        """Run tokens that follow those in the cache, and commit them to it.

        Args:
            token_ids: 1 to `chunk_tokens` ids.
            cache: made by `new_cache`.
            last_only: compute the logits of the last token only.
            between_layers: called before each layer, or once before a pass that cannot stop between layers;
                an exception that it raises ends the pass.

        Returns:
            Logits, fp32 [T, vocab_size] on the CPU; with `last_only` [1, vocab_size].

        Raises:
            CheckpointError: an expert could not be read.
            RequestError: there is no memory left for the pass.
        """
        ...

    def traffic(self) -> Traffic:
        """Counts of where experts were found and of bytes moved, since loading began."""
        ...

    def close(self) -> None:
        """End reads, and save what was learned of the routing; the runner computes nothing afterwards."""
        ...
