"""A prompt layer's routing, on the host: which experts got tokens, where they lie, and in which order they
are computed.

T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok; n experts that got tokens, m pairs of
token and expert. A key is `moe_index * E + expert`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.offload.device.base import Event
from moebox.offload.experts import Int32s
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefill.staging import Staging
from moebox.offload.prefill.token_expert_pairs import Pairs, recent_use, sort_pairs
from moebox.offload.prefill.upload_ring import UploadedGroup


@dataclass(frozen=True)
class RoutedLayer:
    """A layer whose routing is known to the host.

    Its n experts are numbered in the order of `keys`: first those in the GPU's cache, then those that were
    uploaded ahead, then the others in RAM, then those on the drive only. Each part is sorted by falling
    number of tokens.

    Attributes:
        layer: MoE index.
        keys: of the n experts.
        pairs: of token and expert, sorted by the experts' numbers.
        bounds: [n + 1], where each expert's pairs begin, as `pairs.offsets`.
        tokens, weights: int32 and fp32 [m], in pinned memory.
        device_tokens, device_weights: the same on the GPU.
        resident_slots: int32, slots of the experts in the cache.
        ahead_counts: experts of each group that was uploaded ahead.
        recent_use: fp32 [E], what the layer adds to the score of each of its experts.
        hidden, out: bf16 and fp32 [T, H] on the GPU, the experts' input and the sum of their outputs.
        hidden_on_host: `Staging.hidden` holds the input.
        begun_s, begin: the host's time and an event on the GPU when the layer began.
    """

    layer: int
    keys: list[int]
    pairs: Pairs
    bounds: list[int]
    tokens: Int32s
    weights: npt.NDArray[np.float32]
    device_tokens: Tensor
    device_weights: Tensor
    resident_slots: Int32s
    ahead_counts: list[int]
    recent_use: npt.NDArray[np.float32]
    hidden: Tensor
    out: Tensor
    hidden_on_host: Event
    begun_s: float
    begin: Event

    @property
    def n_tokens(self) -> int:
        """T."""
        return len(self.hidden)

    @property
    def first_ahead(self) -> int:
        """The first expert that is not in the cache; so many are in it."""
        return int(self.pairs.starts[1])

    @property
    def first_missing(self) -> int:
        """The first expert that is not on the GPU, neither in the cache nor in the ring."""
        return int(self.pairs.starts[-3])

    @property
    def first_cold(self) -> int:
        """The first expert that lies on the drive only."""
        return int(self.pairs.starts[-2])

    @property
    def n_cold(self) -> int:
        """Experts that lie on the drive only."""
        return len(self.keys) - self.first_cold

    @property
    def all_keys(self) -> range:
        """Keys of all E experts of the layer, with tokens or without."""
        n_experts = len(self.recent_use)
        return range(self.layer * n_experts, (self.layer + 1) * n_experts)


def route_layer(
    layer: int,
    routing: tuple[Tensor, Tensor],
    hidden: Tensor,
    staging: Staging,
    tiers: tuple[RamSlab, GpuSlab],
    ahead: Sequence[UploadedGroup],
    *,
    exclusive: bool,
) -> RoutedLayer:
    """Bring a layer's routing to the host, sort it, and send the pairs back to the GPU.

    Waits until the GPU has routed the layer. The copy of `hidden` to the host goes on meanwhile.

    Args:
        layer: MoE index.
        routing: expert ids int64 [T, k], on the device or the CPU, and their weights fp32 [T, k].
        hidden: bf16 [T, H] on the device.
        ahead: groups in the ring that were uploaded ahead.
        exclusive: RAM's rows change; uploads wait for the downloads of the layer before.
    """
    ram, gpu = tiers
    begun_s, begin = time.perf_counter(), gpu.device.mark()
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    hidden_on_host = _fetch(gpu, routing, hidden, staging, exclusive=exclusive)
    ids = staging.ids[: len(hidden)].numpy()
    n_experts = ram.config.n_routed_experts
    keys = range(layer * n_experts, (layer + 1) * n_experts)
    slots = gpu.residency.table()[keys.start : keys.stop]
    pairs = sort_pairs(ids, _turns(keys, slots, ram.rows[keys.start : keys.stop], ahead), len(ahead) + 3)
    tokens, weights = _stage_pairs(staging, pairs, len(hidden))
    return RoutedLayer(
        layer=layer,
        keys=[keys.start + expert for expert in pairs.experts],
        pairs=pairs,
        bounds=pairs.offsets.tolist(),
        tokens=tokens.numpy(),
        weights=weights.numpy(),
        device_tokens=gpu.device.send(tokens),
        device_weights=gpu.device.send(weights),
        resident_slots=slots[pairs.experts[: int(pairs.starts[1])]],
        ahead_counts=np.diff(pairs.starts[1:-2]).tolist(),
        recent_use=recent_use(ids, n_experts),
        hidden=hidden,
        out=out,
        hidden_on_host=hidden_on_host,
        begun_s=begun_s,
        begin=begin,
    )


def _fetch(
    gpu: GpuSlab, routing: tuple[Tensor, Tensor], hidden: Tensor, staging: Staging, *, exclusive: bool
) -> Event:
    """Copy to `staging`, and wait for the routing; `hidden` is there by the event returned."""
    device, n_tokens = gpu.device, len(hidden)
    for target, source in zip((staging.ids, staging.router_weights), routing, strict=True):
        device.fetch(target[:n_tokens], source)
    routed = device.mark()
    device.downloads.wait(routed)
    device.downloads.copy(staging.hidden[:n_tokens], hidden)
    hidden_on_host = device.downloads.record()
    if exclusive:  # the downloads of the last layer's victims lie before this event
        device.uploads.wait(hidden_on_host)
    routed.synchronize()
    return hidden_on_host


def _turns(keys: range, slots: Int32s, rows: Int32s, ahead: Sequence[UploadedGroup]) -> Int32s:
    """The part that each expert belongs to, int32 [E]: 0 in the cache, 1 to len(ahead) in a group that was
    uploaded ahead, then the others in RAM, then those on the drive only."""
    turns = np.where(slots >= 0, 0, len(ahead) + 1 + (rows < 0)).astype(np.int32)
    for turn, group in enumerate(ahead, 1):
        experts = np.array(list(group.slots)) - keys.start
        of_layer = (experts >= 0) & (experts < len(keys))  # none, where the prompt ended before that layer
        turns[experts[of_layer]] = turn
    return turns


def _stage_pairs(staging: Staging, pairs: Pairs, n_tokens: int) -> tuple[Tensor, Tensor]:
    n_pairs = len(pairs.tokens)
    tokens, weights = staging.tokens[:n_pairs], staging.weights[:n_pairs]
    tokens.numpy()[:] = pairs.tokens
    router_weights = staging.router_weights[:n_tokens].numpy()
    np.take(router_weights.reshape(-1), pairs.order, out=weights.numpy())
    return tokens, weights
