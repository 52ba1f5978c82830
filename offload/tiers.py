"""The routed experts of all layers, shared between a GPU, the CPU and the road between them.

Shapes: T tokens, H hidden_size, I moe_intermediate_size, E n_routed_experts, k num_experts_per_tok, L MoE
layers. A key is `moe_index * E + expert`, where moe_index counts MoE layers from 0.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from moebox.config import ModelConfig
from moebox.kernels import cpu
from moebox.offload.checkpoint import Checkpoint
from moebox.offload.device import Device
from moebox.offload.experts import Progress
from moebox.offload.gpu import GpuTier
from moebox.offload.mailbox import Mailbox
from moebox.offload.ram import RamTier
from moebox.offload.roads import DecodeRoads


class Routing(Protocol):
    """Expert ids that are used instead of the router's: an injected trace. `layer` is an MoE index."""

    def prefill(self, layer: int, tokens: int) -> Tensor:
        """int64 [tokens, k] on the CPU, distinct within a row."""
        ...

    def decode(self) -> Tensor:
        """int32 [L, k] on the CPU, distinct within a row: the next token's."""
        ...


class TieredExperts:
    """Implements `Experts` for prefill; for decode it holds what the token program and its host side share.

    Not thread-safe.

    Attributes:
        device, pool, ram, gpu: what it was built from.
        mailbox, roads: see those modules.
        shape: (H, I).
        routing: replaces the router's choice where set.
        nbytes: INT4 bytes of all experts, wherever they lie.
        records: of the last chunk's layers, see `prefill.LayerRecord`.
    """

    device: Device
    pool: cpu.ThreadPool
    ram: RamTier
    gpu: GpuTier
    mailbox: Mailbox
    roads: DecodeRoads
    shape: tuple[int, int]
    routing: Routing | None
    nbytes: int

    @classmethod
    def build(
        cls,
        config: ModelConfig,
        device: Device,
        pool: cpu.ThreadPool,
        ram: RamTier,
        slots: int,
        exclusive: bool = False,
    ) -> TieredExperts:
        """Allocate the GPU's slab and the mailbox; where RAM is filled already, warm the slots from it.

        `slots` is of cache; `gpu.STAGING_SLOTS` come on top for prefill. Fewer are taken, and said, where
        the device has less memory than was planned.

        Raises:
            PlanError: in exclusive mode RAM and slots together are too small; no memory for staging.
        """
        raise NotImplementedError

    def load(self, checkpoint: Checkpoint, progress: Progress | None = None) -> None:
        """Read all experts from disk into RAM and, as far as there are slots, onto the GPU."""

    def fill_synthetic(self, seed: int = 0) -> None:
        """Random experts of the same size in the same places, without a checkpoint."""

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """See `Experts.forward`: tensors on the device, bf16 `hidden`; `layer` as the model counts.

        Queues the GPU's part on the compute stream and returns when the CPU's part is queued behind it.
        """
        raise NotImplementedError

    def begin_token(self) -> None:
        """Take all flags down: before the token program is launched, when the last one is over."""
        self.roads.clear()

    def run_token(self, timeout_s: float = 30.0) -> None:
        """The host's side of one token, while the program runs: see `DecodeRoads.run_token`."""
        self.roads.run_token(None if self.routing is None else self.routing.decode(), timeout_s)
