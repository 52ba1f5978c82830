"""Expert MLPs on the CPU, computed straight from a checkpoint's INT4 bytes.

Shapes: T tokens, H hidden_size, I moe_intermediate_size; n experts of one call, m pairs of expert and token.
H and I are multiples of 32. Matrices are compressed-tensors `pack-quantized`: int32 [out, in/8], eight
values to a word, the first in the low nibble, stored as q + 8; one bf16 scale for 32 inputs. No array needs
an alignment beyond that of its elements, none is copied, and read-only ones are accepted.

Arrays are torch tensors or numpy arrays; bf16 ones torch bfloat16 or numpy uint16 holding the bits.
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

__all__ = ["Expert", "ThreadPool", "allowed_cpus", "experts_forward", "isa_paths"]


class Expert(_kernels.Expert):
    """An expert's six arrays, as they lie in the checkpoint; kept alive.

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
        super().__init__(*map(_export, arrays))


def _export(array: Array) -> Any:
    """A tensor's DLPack capsule, made in C++: `Tensor.__dlpack__` is Python and takes ten times as long."""
    return to_dlpack(array) if isinstance(array, torch.Tensor) else array


def isa_paths() -> tuple[str, ...]:
    """Instruction sets the kernels can use on this machine, best first.

    Of "amx", "avx512bf16", "avx512", "avx2" and "scalar"; the last is always there.
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

    The same inputs give the same bits on any number of threads. Another `isa`, or an expert's number of
    tokens crossing from few to many, changes the result by rounding only. With fp32 hidden states all is
    fp32 (relative error below 1e-6). With bf16 ones, few tokens are multiplied as 16-bit integers scaled by
    group, which is finer than bf16 (1e-4), and many in fp32 or, with AVX-512 BF16 and AMX, in bf16 (4e-3);
    sums are fp32. The GIL is released; calls on one pool wait for each other.

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
        ValueError: a shape, stride, offset, token or isa is wrong; the message names it, its value and the
            one needed.
        RuntimeError: the pool was made in another process, before fork().
    """
    _kernels.experts_forward(
        pool,
        experts,
        _export(offsets),
        _export(tokens),
        _export(weights),
        _export(hidden),
        _export(out),
        isa,
    )
