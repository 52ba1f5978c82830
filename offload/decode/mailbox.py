"""Where the GPU's decode program and the host's side of it (`roads.DecodeRoads`) leave things for each other.

L MoE layers, k num_experts_per_tok, H hidden_size. Rows belong to layers, so nothing is written twice in a
token. A flag is element 0 of a cache line of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebox.offload.device.base import Device

FLAG_WORDS = 16
"""int32 words of a cache line."""
PART_WORDS = 4


@dataclass(frozen=True)
class Mailbox:
    """Tensors in pinned RAM, read and written by both sides; only `uploaded` lies on the device.

    Attributes:
        routed: int32 [L, 16], raised by the GPU behind `ids`, `weights` and `hidden`.
        listed: int32 [L, 16], raised by the host behind `hits`, `uploads` and their weights.
        uploaded: int32 [L, 16] in device memory, raised by the copy stream behind the uploads.
        summed: int32 [L, 16], raised by the host behind `sums`.
        ids, weights: int32 and fp32 [L, k], what the router chose.
        hidden: bf16 [L, H], the experts' input.
        hits, hit_weights: int32 [L, 1 + k], how many experts are in slots and which; fp32 [L, k].
        uploads, upload_weights: the same for experts whose upload `uploaded` announces.
        part, part_weight: int32 [L, 4] and fp32 [L, 1], an expert that both compute: its row in RAM, or -1,
            and how many of its inner rows the GPU reads from there; published with `hits`.
        sums: fp32 [L, H], the CPU's share.
        guessed: int32 [L, 16], raised by the GPU behind `guesses`, while it computes the layer before.
        guesses: int32 [L, k], what the layer will probably pick, the likeliest first; row 0 is not used.
        one: int32 [16], holds 1: what is copied to `uploaded`.
    """

    routed: Tensor
    listed: Tensor
    uploaded: Tensor
    summed: Tensor
    ids: Tensor
    weights: Tensor
    hidden: Tensor
    hits: Tensor
    hit_weights: Tensor
    uploads: Tensor
    upload_weights: Tensor
    part: Tensor
    part_weight: Tensor
    sums: Tensor
    guessed: Tensor
    guesses: Tensor
    one: Tensor

    @classmethod
    def allocate(cls, device: Device, layers: int, top_k: int, hidden_size: int) -> Mailbox:
        """Zeros everywhere, but for `one` and the rows of `part`."""
        flags = (layers, FLAG_WORDS)
        box = cls(
            routed=device.pinned(flags, torch.int32),
            listed=device.pinned(flags, torch.int32),
            uploaded=device.empty(flags, torch.int32).zero_(),
            summed=device.pinned(flags, torch.int32),
            ids=device.pinned((layers, top_k), torch.int32),
            weights=device.pinned((layers, top_k), torch.float32),
            hidden=device.pinned((layers, hidden_size), torch.bfloat16),
            hits=device.pinned((layers, 1 + top_k), torch.int32),
            hit_weights=device.pinned((layers, top_k), torch.float32),
            uploads=device.pinned((layers, 1 + top_k), torch.int32),
            upload_weights=device.pinned((layers, top_k), torch.float32),
            part=device.pinned((layers, PART_WORDS), torch.int32),
            part_weight=device.pinned((layers, 1), torch.float32),
            sums=device.pinned((layers, hidden_size), torch.float32),
            guessed=device.pinned(flags, torch.int32),
            guesses=device.pinned((layers, top_k), torch.int32),
            one=device.pinned((FLAG_WORDS,), torch.int32),
        )
        box.one.fill_(1)
        box.part[:, 0] = -1
        return box

    def raise_flags(self) -> None:
        """Let a program run without a host, as if no expert had been chosen: before it is compiled.

        `DecodeRoads.clear` takes the flags down again.
        """
        self.raise_host_flags()
        self.uploaded.fill_(1)

    def raise_host_flags(self) -> None:
        """The flags in RAM alone, and nothing chosen: all that the host can do while a program is waiting."""
        for tensor in (self.hits, self.uploads, self.sums):
            tensor.zero_()
        self.part[:, 0] = -1
        for flags in (self.listed, self.summed):
            flags.fill_(1)
