"""The interfaces of prefetching: what predicts a layer's picks, and what the decode loop calls.

Shapes: H hidden_size, k num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor


class Predictor(Protocol):
    """Predicts which experts the next layers will pick."""

    def predict(self, moe: int, hidden: Tensor) -> Iterator[tuple[int, list[int]]]:
        """Predict the picks of the layers after MoE layer `moe`, each when the iterator is advanced.

        Args:
            moe: index of an MoE layer, from 0.
            hidden: [1, H], the input of that layer's router.

        Returns:
            (layers ahead, expert ids) for each layer, the nearest first. There are at least k ids, the
            likeliest first: a read that was begun for an earlier prediction goes on if its expert is among
            them.
        """
        ...


class TokenPrefetcher(Protocol):
    """Prefetches experts while a token is decoded. The decode loop calls it for each layer, in order."""

    def begin_layer(self, moe: int, picks: Sequence[int]) -> None:
        """MoE layer `moe` is routed to the experts `picks`; none of them is demanded yet."""
        ...

    def prefetch_next(self, moe: int, hidden: Tensor, picks: Sequence[int]) -> None:
        """The layer's own reads are queued; `hidden` [1, H] is its router's input. Prefetches can begin."""
        ...

    def end_layer(self, moe: int) -> None:
        """The layer is computed, and rows are free again."""
        ...

    def end_token(self) -> None:
        """The token's last layer is computed."""
        ...
