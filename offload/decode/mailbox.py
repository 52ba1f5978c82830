"""The mailbox: tensors through which the GPU's decode program and its host side exchange one token's data.

`csrc/decode/mailbox.h` has the only list of them, which is `MAILBOX_FIELDS` here: `Mailbox.allocate` makes
each tensor of the list, and `DecodeHost` checks each against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebox import _kernels
from moebox.offload.device.base import Device


class MailboxField(NamedTuple):
    """A tensor of the mailbox.

    Attributes:
        dtype: torch's name of it.
        symbols: its shape: L MoE layers, k experts per token, H hidden_size, n predicted experts,
            F FLAG_WORDS, S SPLIT_WORDS, 1+k, 1.
        writer: "gpu", "host", or "copies" for the stream of uploads.
        memory: "pinned" RAM or "device".
    """

    name: str
    dtype: str
    symbols: tuple[str, ...]
    writer: str
    memory: str
    meaning: str

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


MAILBOX_FIELDS: tuple[MailboxField, ...] = tuple(MailboxField(*row) for row in _kernels.MAILBOX_FIELDS)


class Mailbox:
    """One tensor for each field of `MAILBOX_FIELDS`, by name: `box.ids` is int32 [L, k].

    Attributes:
        tensors: all of them, by name.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        vars(self).update(tensors)

    @classmethod
    def allocate(cls, device: Device, layers: int, top_k: int, hidden_size: int) -> Mailbox:
        """Zeros in pinned RAM and on the device; `one` holds 1, and no expert is split.

        Args:
            layers: MoE layers.
            top_k: experts chosen per token; as many are predicted.
        """
        shapes = _kernels.mailbox_shapes(layers, top_k, hidden_size, top_k)
        box = cls({field.name: _zeros(device, field, shapes[field.name]) for field in MAILBOX_FIELDS})
        box.one.fill_(1)
        box.split_expert[:, 0] = -1
        return box

    def raise_flags(self) -> None:
        """Raise all flags, and list no expert. A program then runs without a host, as its compilation needs.

        `DecodeHost.clear_flags` takes the flags down again.
        """
        self.raise_host_flags()
        self.uploaded.fill_(1)

    def raise_host_flags(self) -> None:
        """Raise the flags in RAM, and list no expert. `uploaded`, on the device, stays as it is."""
        for tensor in (self.resident_slots, self.upload_slots, self.cpu_sums):
            tensor.zero_()
        self.split_expert[:, 0] = -1
        for flags in (self.listed, self.summed):
            flags.fill_(1)


def _zeros(device: Device, field: MailboxField, shape: Sequence[int]) -> Tensor:
    if field.memory == "device":
        return device.empty(shape, field.torch_dtype).zero_()
    return device.pinned(shape, field.torch_dtype)
