"""Expert MLPs on the CPU, computed from a checkpoint's INT4 bytes as they are.

Shapes: T tokens, H hidden_size, I moe_intermediate_size; n experts of one call, m pairs of expert and token.
H and I are multiples of 32. Matrices are compressed-tensors `pack-quantized`: int32 [out, in/8], eight
values to a word, the first in the low nibble, stored as q + 8; one bf16 scale for 32 inputs.

Arrays are torch tensors or numpy arrays; bf16 ones torch bfloat16 or numpy uint16 that holds the bits. The
kernels copy none, and need no alignment beyond that of the elements. Arrays that are only read may be
read-only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]  # public, but not in __all__

from moebox import _kernels
from moebox._kernels import ThreadPool

if TYPE_CHECKING:
    from moebox._kernels import Array

__all__ = [
    "BATCH_PAIRS",
    "PART_TOKENS",
    "Expert",
    "ThreadPool",
    "allowed_cpus",
    "experts_forward",
    "export_array",
    "isa_paths",
]

BATCH_PAIRS = _kernels.BATCH_PAIRS
"""Pairs that `experts_forward` computes at a time, which bounds its scratch memory."""

PART_TOKENS = 1024
"""Tokens of one `experts_forward` call: the runtime computes a longer chunk of a prompt as several parts.

An expert's number of tokens decides how its result is rounded, so equal parts give equal bits.
"""


class Expert(_kernels.Expert):
    """An expert's six arrays as they are in the checkpoint. It keeps them alive and only reads them.

    Args:
        gate_packed, up_packed: int32 [I, H/8].
        gate_scale, up_scale: bf16 [I, H/32].
        down_packed: int32 [H, I/8].
        down_scale: bf16 [H, I/32].

    Raises:
        TypeError, ValueError: as `experts_forward`.
    """

    __slots__ = ()

    def __init__(
        self,
        gate_packed: Array,
        gate_scale: Array,
        up_packed: Array,
        up_scale: Array,
        down_packed: Array,
        down_scale: Array,
    ) -> None:
        arrays = (gate_packed, gate_scale, up_packed, up_scale, down_packed, down_scale)
        super().__init__(*map(export_array, arrays))


def export_array(array: Array) -> Any:
    """The array in a form that `_kernels` takes: a tensor as a DLPack capsule, a numpy array as it is.

    The capsule is made in C++; `Tensor.__dlpack__`, which `_kernels` would call, is Python and takes ten
    times as long. A capsule can be used once.
    """
    return to_dlpack(array) if isinstance(array, torch.Tensor) else array


def isa_paths() -> tuple[str, ...]:
    """Instruction sets that the kernels can use on this machine, best first.

    They are among "amx", "avx512bf16", "avx512", "avx2" and "scalar"; the last is always there.
    """
    return tuple(_kernels.isa_paths())


def allowed_cpus() -> int:
    """CPUs this process may use: its affinity mask, cut to its cgroup's quota. `ThreadPool`'s default."""
    return _kernels.allowed_cpus()


def experts_forward(
    pool: ThreadPool,
    experts: Sequence[Expert],
    offsets: Array,
    tokens: Array,
    weights: Array,
    hidden: Array,
    out: Array,
    isa: str | None = None,
) -> None:
    """Add each expert's output for its tokens to `out`: `w * down(silu(gate x) * up x)`.

    Expert i gets the pairs j from `offsets[i]` to `offsets[i + 1]`, and
    `out[tokens[j]] += weights[j] * expert_i(hidden[tokens[j]])`, in the order of j.

    The same inputs give the same bits on any number of threads. Another `isa`, or a change of an expert's
    number of tokens from few to many, changes the result by rounding only. With fp32 hidden states all
    arithmetic is fp32 (relative error below 1e-6). With bf16 hidden states, few tokens are multiplied as
    16-bit integers with a scale for each group of 32, which is finer than bf16 (relative error 1e-4); many
    tokens in fp32 or, with AVX-512 BF16 and AMX, in bf16 (4e-3). Sums are fp32. The call releases the GIL;
    calls on one pool wait for each other.

    Args:
        pool: the threads to use.
        experts: n experts of the same H and I.
        offsets: int32 [n + 1], ascending from 0 to m.
        tokens: int32 [m], rows of `hidden`.
        weights: fp32 [m].
        hidden: bf16 or fp32 [T, H].
        out: fp32 [T, H], added to in place.
        isa: one of `isa_paths()`; the best by default.

    Raises:
        TypeError: an array's dtype or device is wrong.
        ValueError: a shape, stride, offset, token or isa is wrong, or `out` is read-only; the message names
            the argument, its value and the one needed.
        RuntimeError: the pool was made in another process, before fork().
    """
    _kernels.experts_forward(
        pool,
        experts,
        export_array(offsets),
        export_array(tokens),
        export_array(weights),
        export_array(hidden),
        export_array(out),
        isa,
    )
