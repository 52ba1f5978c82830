"""The interface between the model and its routed experts.

The model passes a layer, expert ids, weights and hidden states. `cpu_experts.py`, on a box without a GPU, or
`gpu_experts.py`, on a box with one, finds where each expert lies and computes the experts.

Shapes: T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moebox.offload.traffic import Traffic

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, bytes done, and bytes in all."""
Int32s = npt.NDArray[np.int32]
TIERS = ("drive", "RAM", "GPU")
"""Where an expert can lie. A placement, uint8 [L, E], has an index into this for each expert."""


class Experts(Protocol):
    """The routed experts of all layers, wherever they lie.

    Attributes:
        nbytes: INT4 bytes of all experts.
    """

    nbytes: int

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            layer: index of an MoE layer.
            expert_ids: int64 [T, k], in any order.
            weights: fp32 [T, k].
            hidden: bf16 or fp32 [T, H].

        Returns:
            fp32 [T, H]: `sum_j weights[t, j] * expert[expert_ids[t, j]](hidden[t])`.
        """
        ...

    def traffic(self) -> Traffic:
        """Where experts were found and what moved since loading began. Subtract two for a request's."""
        ...


def group_by_expert(
    expert_ids: npt.NDArray[np.int64],
) -> tuple[list[int], Int32s, Int32s, npt.NDArray[np.intp]]:
    """Turn each token's experts into each expert's tokens.

    Args:
        expert_ids: [T, k].

    Returns:
        The n distinct experts, ascending; offsets int32 [n + 1] and tokens int32 [T * k], so that the
        i-th expert gets `tokens[offsets[i]:offsets[i + 1]]`; the permutation [T * k] that sorts the flat ids.
    """
    count, top_k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    if flat.size and int(flat.max()) < 1 << 15:
        flat = flat.astype(np.int16)  # numpy sorts 16-bit integers by radix: a tenth of the time
    order = np.argsort(flat, kind="stable")
    if count == 1:  # decoding: every expert has the one token
        return flat[order].tolist(), np.arange(top_k + 1, dtype=np.int32), np.zeros(top_k, np.int32), order
    in_order = flat[order]
    bounds = [0, *(np.flatnonzero(in_order[1:] != in_order[:-1]) + 1).tolist(), flat.size]
    tokens = (order // top_k).astype(np.int32)
    return in_order[bounds[:-1]].tolist(), np.array(bounds, np.int32), tokens, order
