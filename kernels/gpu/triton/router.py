"""The router: sigmoid, bias, groups, top-k and weights, by one program a token. See `base.Ops`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebox.kernels.gpu.base import RouterSpec
from moebox.kernels.gpu.triton.overlap import after_previous, launch_options, start_next
from moebox.kernels.gpu.triton.signals import COPY_BLOCK, copy_vector, raise_flag

NOTHING = tl.constexpr(-(2**63))
"""Less than every key."""


@triton.jit
def _keys(value, index, valid):
    """int64 keys in the order of the fp32 values; of equal values the lower index has the greater key.

    `NOTHING` where not valid.
    """
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(valid, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64), NOTHING)


@triton.jit
def _index(key):
    """The index that a key of `_keys` was made from."""
    return 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _mask_groups(choice, member, valid, MEMBERS: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """-inf outside the `KEPT` groups whose two best experts score highest."""
    choice = tl.where(valid, choice, float("-inf"))
    keys = _keys(choice, member, valid)
    best = tl.max(keys, 1)
    score = tl.max(choice, 1)
    if MEMBERS > 1:
        score += tl.max(tl.where(keys == best[:, None], float("-inf"), choice), 1)
    index = tl.arange(0, choice.shape[0])
    keys = _keys(score, index, index < GROUPS)
    kept = tl.zeros_like(index)
    for _ in tl.static_range(KEPT):
        best = tl.max(keys, 0)
        kept = tl.where(keys == best, 1, kept)
        keys = tl.where(keys == best, NOTHING, keys)
    return tl.where(kept[:, None] == 1, choice, float("-inf"))


@triton.jit
def _choose(
    logits,
    bias,
    scale,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
):
    """One token's ids int32 and weights fp32, [TOP_K rounded up to a power of 2]."""
    group = tl.arange(0, triton.next_power_of_2(GROUPS))[:, None]
    member = tl.arange(0, triton.next_power_of_2(MEMBERS))[None, :]
    expert = group * MEMBERS + member
    valid = (group < GROUPS) & (member < MEMBERS)
    choice = tl.sigmoid(tl.load(logits + expert, mask=valid, other=0.0))
    choice += tl.load(bias + expert, mask=valid, other=0.0)
    if GROUPS > 1:
        choice = _mask_groups(choice, member, valid, MEMBERS, GROUPS, KEPT)
    keys = _keys(choice, expert, valid)
    place = tl.arange(0, triton.next_power_of_2(TOP_K))
    ids = tl.zeros_like(place)
    for rank in tl.static_range(TOP_K):
        best = tl.max(tl.max(keys, 1), 0)
        ids = tl.where(place == rank, _index(best), ids)
        keys = tl.where(keys == best, NOTHING, keys)
    weights = tl.sigmoid(tl.load(logits + ids))
    weights = tl.where(place < TOP_K, weights, 0.0)
    if NORM:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    return ids, weights * scale


@triton.jit
def _route(
    logits,
    bias,
    ids_out,
    weights_out,
    scale,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * MEMBERS * GROUPS
    ids, weights = _choose(row, bias, scale, MEMBERS, GROUPS, KEPT, TOP_K, NORM)
    place = tl.arange(0, triton.next_power_of_2(TOP_K))
    tl.store(ids_out + token * TOP_K + place, ids.to(tl.int64), mask=place < TOP_K)
    tl.store(weights_out + token * TOP_K + place, weights, mask=place < TOP_K)


@triton.jit
def _route_and_post(
    logits,
    bias,
    hidden,
    mailbox_ids,
    mailbox_weights,
    mailbox_hidden,
    flag,
    scale,
    width,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    copy_vector(hidden, mailbox_hidden, width, BLOCK)  # first: it crosses the bus during the choice
    ids, weights = _choose(logits, bias, scale, MEMBERS, GROUPS, KEPT, TOP_K, NORM)
    place = tl.arange(0, triton.next_power_of_2(TOP_K))
    tl.store(mailbox_ids + place, ids, mask=place < TOP_K)
    tl.store(mailbox_weights + place, weights, mask=place < TOP_K)
    raise_flag(flag)


@triton.jit
def _predict(
    logits,
    bias,
    mailbox_ids,
    flag,
    MEMBERS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    ids, _ = _choose(logits, bias, 1.0, MEMBERS, GROUPS, KEPT, TOP_K, NORM)
    place = tl.arange(0, triton.next_power_of_2(TOP_K))
    tl.store(mailbox_ids + place, ids, mask=place < TOP_K)
    raise_flag(flag)


def _settings(n_experts: int, spec: RouterSpec) -> dict[str, int | bool]:
    return launch_options() | {
        "MEMBERS": n_experts // spec.n_group,
        "GROUPS": spec.n_group,
        "KEPT": spec.topk_group,
        "TOP_K": spec.num_experts_per_tok,
        "NORM": spec.norm_topk_prob,
    }


def route(logits: Tensor, bias: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    count, n_experts = logits.shape
    ids = torch.empty(count, spec.num_experts_per_tok, dtype=torch.int64, device=logits.device)
    weights = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    settings = _settings(n_experts, spec)
    if count:
        _route[(count,)](logits, bias, ids, weights, spec.routed_scaling_factor, **settings, num_warps=1)
    return ids, weights


def route_and_post(
    logits: Tensor,
    bias: Tensor,
    spec: RouterSpec,
    hidden: Tensor,
    mailbox_ids: Tensor,
    mailbox_weights: Tensor,
    mailbox_hidden: Tensor,
    flag: Tensor,
) -> None:
    mailbox = (mailbox_ids, mailbox_weights, mailbox_hidden, flag)
    settings = _settings(logits.shape[0], spec)
    scale, width = spec.routed_scaling_factor, hidden.shape[0]
    _route_and_post[(1,)](
        logits, bias, hidden, *mailbox, scale, width, **settings, BLOCK=COPY_BLOCK, num_warps=4
    )


def predict(logits: Tensor, bias: Tensor, spec: RouterSpec, mailbox_ids: Tensor, flag: Tensor) -> None:
    _predict[(1,)](logits, bias, mailbox_ids, flag, **_settings(logits.shape[0], spec), num_warps=1)
