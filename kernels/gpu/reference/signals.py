"""Posts to the mailbox and flags, in plain torch. `base.Ops` documents the functions."""

from __future__ import annotations

import time

from torch import Tensor


def wait(flag: Tensor) -> None:
    while not flag[0].item():
        time.sleep(0)


def post(
    ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    mailbox_ids: Tensor,
    mailbox_weights: Tensor,
    mailbox_hidden: Tensor,
    flag: Tensor,
) -> None:
    mailbox_ids.copy_(ids)
    mailbox_weights.copy_(weights)
    mailbox_hidden.copy_(hidden)
    flag[0] = 1  # last: a reader that sees the flag may read the mailbox
