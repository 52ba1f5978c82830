"""INT4 experts on the GPU, straight from slots that hold an expert's bytes as they lie on disk (Triton).

Shapes: T tokens, H hidden_size, I moe_intermediate_size, both multiples of 32; n experts of one call, m pairs
of expert and token, k the most experts of one token. Slots: see `slots.py`.
"""

from __future__ import annotations

from torch import Tensor

from moebox.kernels.gpu import experts_reference


def experts_one(
    slab: Tensor, shape: tuple[int, int], listed: Tensor, weights: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """One token through listed experts: `out = sum of weights[j] * expert_j(hidden)`; zeros for none.

    How many there are is read on the device, so the call can stand in a CUDA graph. The same inputs give
    the same bits.

    Args:
        slab: uint8 [slots, stride].
        shape: (H, I).
        listed: int32 [1 + k]: a count, then as many slots. May lie in pinned host memory, as may `weights`.
        weights: fp32 [k].
        hidden: bf16 [H].
        out: fp32 [H], overwritten.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    experts_reference.experts_one(slab, shape, listed, weights, hidden, out)


def experts_many(
    slab: Tensor,
    shape: tuple[int, int],
    slots: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    weights: Tensor,
    hidden: Tensor,
    out: Tensor,
    counts: list[int] | None = None,
) -> None:
    """Add each expert's output for its tokens to `out`, as `moebox.kernels.cpu.experts_forward` does.

    The expert in `slots[i]` gets the pairs j from `offsets[i]` to `offsets[i + 1]`, and
    `out[tokens[j]] += weights[j] * expert_i(hidden[tokens[j]])`. The same inputs give the same bits.

    Args:
        slab: uint8 [slots, stride].
        shape: (H, I).
        slots: int32 [n], on the device as are all tensors.
        offsets: int32 [n + 1], ascending from 0 to m.
        tokens: int32 [m], rows of `hidden`.
        weights: fp32 [m].
        hidden: bf16 [T, H].
        out: fp32 [T, H], added to in place.
        counts: tokens of each expert, known on the host; without them the call waits for the device.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    experts_reference.experts_many(slab, shape, slots, offsets, tokens, weights, hidden, out, counts)
