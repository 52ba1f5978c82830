"""Words between a running GPU program and the host: boxes and flags in pinned memory.

A flag is raised once per launch and lowered by the host before the next one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebox.kernels.gpu.triton.overlap import after_previous, launch_options, start_next

COPY_BLOCK = 8192


@triton.jit
def _wait(flag, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    seen = tl.load(flag, volatile=True)
    while seen == 0:
        # A plain load: a read-modify-write of host memory could undo the host's own store.
        seen = tl.load(flag, volatile=True)
    after_previous(OVERLAP)


@triton.jit
def copy_vector(src, dst, length, BLOCK: tl.constexpr):
    """`dst[:length] = src[:length]` by one program."""
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(dst + index, tl.load(src + index, mask=index < length), mask=index < length)


@triton.jit
def raise_flag(flag):
    """Set the flag after all that this program has stored, for the whole system to see."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def _post(
    ids,
    weights,
    hidden,
    box_ids,
    box_weights,
    box_hidden,
    flag,
    width,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    copy_vector(hidden, box_hidden, width, BLOCK)
    copy_vector(ids, box_ids, K, triton.next_power_of_2(K))
    copy_vector(weights, box_weights, K, triton.next_power_of_2(K))
    raise_flag(flag)


def wait(flag: Tensor) -> None:
    """See `Ops.wait`: one warp polls."""
    _wait[(1,)](flag, num_warps=1, **launch_options())


def post(
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    box_ids: Tensor,
    box_weights: Tensor,
    box_hidden: Tensor,
    flag: Tensor,
) -> None:
    """See `Ops.post`."""
    _post[(1,)](
        ids,
        weights,
        hidden,
        box_ids,
        box_weights,
        box_hidden,
        flag,
        hidden.shape[0],
        K=ids.shape[0],
        BLOCK=COPY_BLOCK,
        num_warps=8,
        **launch_options(),
    )
