"""Posts to the mailbox and waits for flags in pinned memory, while the host watches the same memory.

A program raises a flag once per launch; the host clears it before the next launch. `base.Ops` documents
`wait` and `post`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moebox.kernels.gpu.triton.overlap import after_previous, launch_options, start_next

COPY_BLOCK = 8192
"""Elements that a program copies at a time."""


@triton.jit
def _wait(flag, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    seen = tl.load(flag, volatile=True)
    while seen == 0:
        # A plain load: a read-modify-write of host memory could undo a store of the host.
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
    """Store 1 in the flag after all stores of this program; the host sees them in this order."""
    tl.debug_barrier()
    tl.atomic_xchg(flag, 1, sem="release", scope="sys")


@triton.jit
def _post(
    ids,
    weights,
    hidden,
    mailbox_ids,
    mailbox_weights,
    mailbox_hidden,
    flag,
    width,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    copy_vector(hidden, mailbox_hidden, width, BLOCK)
    copy_vector(ids, mailbox_ids, K, triton.next_power_of_2(K))
    copy_vector(weights, mailbox_weights, K, triton.next_power_of_2(K))
    raise_flag(flag)


def wait(flag: Tensor) -> None:
    """One warp polls the flag."""
    _wait[(1,)](flag, num_warps=1, **launch_options())


def post(
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    mailbox_ids: Tensor,
    mailbox_weights: Tensor,
    mailbox_hidden: Tensor,
    flag: Tensor,
) -> None:
    _post[(1,)](
        ids,
        weights,
        hidden,
        mailbox_ids,
        mailbox_weights,
        mailbox_hidden,
        flag,
        hidden.shape[0],
        K=ids.shape[0],
        BLOCK=COPY_BLOCK,
        num_warps=8,
        **launch_options(),
    )
