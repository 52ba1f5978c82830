"""The routed experts of a box with a GPU: shared between the GPU, the CPU, and PCIe between the two.

Shapes: T tokens, H hidden_size, I moe_intermediate_size, E n_routed_experts, k num_experts_per_tok, L MoE
layers. A key is `moe_index * E + expert`, where moe_index counts MoE layers from 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.decode.host_step import FIELDS, DecodeHost
from moebox.offload.decode.mailbox import Mailbox
from moebox.offload.decode.upload_ahead import OnOffTrial, UploadAheadTrial
from moebox.offload.device.base import Device
from moebox.offload.disk.base import Source
from moebox.offload.disk.store import ExpertStore
from moebox.offload.disk.synthetic import SyntheticSource
from moebox.offload.experts import TIERS, Progress
from moebox.offload.memory.cold_reader import ColdReader, least_rows, spare_rows
from moebox.offload.memory.gpu_slab import GpuSlab, spread_keys
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.memory.rows import RamRows
from moebox.offload.prefill.layer import PrefillExperts
from moebox.offload.residency import Residency
from moebox.offload.routing.recorder import RoutingRecorder
from moebox.offload.self_check import check_expert_kernels
from moebox.offload.traffic import Traffic

if TYPE_CHECKING:
    from moebox.offload.routing.statistics import RouterStatistics


_DECODED = ("hits", "uploads", "part", "cpu", "cold", "wasted")
_COLUMNS = [FIELDS.index(name) for name in _DECODED]


class Routing(Protocol):
    """An injected trace: expert ids that are used instead of the routers' choice."""

    def prefill(self, layer: int, tokens: int) -> Tensor:
        """A prompt's ids in an MoE layer, from 0: int64 [tokens, k] on the CPU, distinct within a row."""
        ...

    def decode(self) -> Tensor:
        """The next token's ids in all layers: int32 [L, k] on the CPU, distinct within a row."""
        ...


class GpuExperts:
    """Implements `Experts` for prompts. A token's experts are computed by the GPU's token program together
    with `serve_token`; the two share the slabs and the mailbox.

    Not thread-safe.

    Attributes:
        config: of the model.
        device, pool: compute on the GPU and on the CPU.
        ram, gpu: the slabs.
        rows: of RAM in exclusive mode, where an expert lies in RAM or on the GPU, but not in both; else None.
        cold: reads experts that lie in neither; None where there are none.
        mailbox, decode_host: what a token's program shares with the host, and the host's side of it.
        prefill: computes prompts.
        shape: (H, I).
        routing: replaces the routers' choice, if set.
        predictions: int32 [L, k] of each token that is decoded with `routing`; replaces the routers'
            predictions, if set.
        ahead: decides whether tokens upload ahead; None: no token does.
        nbytes: INT4 bytes of all experts, wherever they lie.
    """

    def __init__(
        self,
        pool: cpu.ThreadPool,
        ram: RamSlab,
        gpu: GpuSlab,
        rows: RamRows | None = None,
        cold: ColdReader | None = None,
    ) -> None:
        """Take the parts that `build` has allocated; callers use `build`."""
        config, device = ram.config, gpu.device
        self.config, self.device, self.pool, self.ram, self.gpu = config, device, pool, ram, gpu
        self.rows, self.cold = rows, cold
        self.shape = gpu.shape
        self.routing: Routing | None = None
        self.predictions: Callable[[], Tensor] | None = None
        self.ahead: UploadAheadTrial | None = None
        self.nbytes = config.experts_bytes
        self.prefill = PrefillExperts(pool, ram, gpu, rows, cold)
        self.mailbox = Mailbox.allocate(
            device, len(config.moe_layers), config.num_experts_per_tok, config.hidden_size
        )
        self.decode_host = self._build_decode_host()
        self._decoded = np.zeros(len(_DECODED))

    @classmethod
    def build(
        cls,
        device: Device,
        pool: cpu.ThreadPool,
        ram: RamSlab,
        slots: int,
        exclusive: bool = False,
        store: ExpertStore | None = None,
    ) -> GpuExperts:
        """Allocate the GPU's slab and the mailbox. If RAM holds all experts already, fill the slots from it.

        Args:
            pool: computes the CPU's experts.
            ram: rows of experts, pinned for the device.
            slots: of the GPU's cache; the ring comes on top. Where the device has less memory than was
                planned, there are fewer, and a warning says so.
            exclusive: an expert lies in RAM or on the GPU, not in both.
            store: in exclusive mode, experts beyond RAM and slots are read from it; it must stay open. None:
                RAM and slots must hold all experts.

        Raises:
            PlanError: RAM, or in exclusive mode RAM and slots together, is too small; no memory for the ring.
        """
        gpu = GpuSlab(ram.config, device, slots)
        rows = cold = None
        if store is not None and exclusive and ram.n_rows + gpu.n_cached < ram.n_keys:
            _check_rows(ram)
            rows = RamRows(ram, spare_rows(ram.n_rows, ram.config.num_experts_per_tok))
            cold = ColdReader(rows, store)
        else:
            _check_room(ram, gpu, exclusive)
            rows = RamRows(ram) if exclusive else None
        experts = cls(pool, ram, gpu, rows, cold)
        if (ram.rows >= 0).all():
            experts._warm(experts._spread_keys())
        return experts

    def load(
        self, store: Source, statistics: RouterStatistics | None = None, progress: Progress | None = None
    ) -> None:
        """Read experts from disk onto the GPU and into RAM, as far as there are slots and rows.

        Args:
            store: has all experts.
            statistics: give the order in which experts are placed, the most used first, and the first scores.
            progress: called with ("experts", bytes done, bytes in all).

        Raises:
            CheckpointError: an expert could not be read.
        """
        known = statistics is not None and statistics.tokens > 0
        self.fill(store, progress, statistics.order() if statistics is not None and known else None)
        if statistics is not None and known:
            keys, scores = np.arange(self.ram.n_keys, dtype=np.int32), statistics.seed_scores()
            for residency in self._residencies():
                residency.seed(keys, scores)

    def fill_synthetic(self, seed: int = 0) -> None:
        """Fill with random experts, without a checkpoint; see `SyntheticSource`."""
        self.fill(SyntheticSource(self.config, seed))

    def fill(
        self, source: Source, progress: Progress | None = None, order: Sequence[int] | None = None
    ) -> None:
        """Empty the cache and RAM, and fill both with experts from `source`.

        Args:
            progress: called with ("experts", bytes done, bytes in all).
            order: all keys. The first ones go to the GPU; the last ones stay on disk if there is no room.
                None: an order that is even over the layers.
        """
        self.synchronize()
        self.gpu.clear()
        keys, n_cache = self._spread_keys() if order is None else order, self.gpu.n_cached
        if self.rows is None:
            self.ram.fill(source, progress=progress)
            self._warm(keys)
            return
        in_memory = keys if self.cold is None else keys[: n_cache + self.rows.capacity]
        n, nbytes = len(in_memory), self.config.expert_bytes
        for first in range(0, n_cache, self.ram.n_rows):  # through RAM's rows, which are filled last
            batch = in_memory[first : min(first + self.ram.n_rows, n_cache)]
            self.ram.fill(source, batch, _part_of(progress, first, n, nbytes))
            self.gpu.fill(self.ram, batch)
        self.ram.fill(source, in_memory[n_cache:], _part_of(progress, n_cache, n, nbytes))
        self.rows.take_over()
        self._get_ready()

    def placement(self) -> npt.NDArray[np.uint8]:
        """Where each expert lies: uint8 [L, E] of indices into `TIERS`; copies under way count as done."""
        tiers = np.full(self.ram.n_keys, TIERS.index("drive"), np.uint8)
        tiers[self.ram.rows >= 0] = TIERS.index("RAM")
        tiers[self.gpu.residency.table() >= 0] = TIERS.index("GPU")
        return tiers.reshape(-1, self.config.n_routed_experts)

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, as `Experts.forward` defines it; tensors are on the device, and
        `hidden` is bf16.

        Call it layer by layer, in order; the first layer begins a prompt. It returns when all of the GPU's
        work is queued on the compute stream, and the CPU's is done.

        Raises:
            DeviceError: a copy failed.
            CheckpointError: an expert could not be read.
        """
        moe = layer - self.config.first_k_dense_replace
        self.decode_host.wait_for_copies()
        if moe == 0:
            for residency in self._residencies():
                residency.tick += len(hidden)
        if self.routing is not None:
            expert_ids = self.routing.prefill(moe, len(hidden))
        return self.prefill.run(moe, expert_ids, weights, hidden)

    def upload_ahead(self, trial: OnOffTrial | None = None) -> None:
        """Upload predicted experts while PCIe is idle during decoding, as long as `trial` finds that this
        pays.

        Does nothing where no expert is ever uploaded.
        """
        if 0 < self.gpu.n_cached < self.ram.n_keys:
            self.ahead = UploadAheadTrial(self.decode_host, trial)

    @property
    def predicting(self) -> bool:
        """Whether the coming token's program predicts. The routers cannot predict an injected trace."""
        known = self.routing is None or self.predictions is not None
        return self.ahead is not None and self.ahead.on and known

    def begin_token(self) -> None:
        """Take all flags down. Call it before the token program is launched, after the last one has ended."""
        self.prefill.synchronize()
        self.decode_host.clear_flags()

    def serve_token(self, timeout_s: float = 30.0) -> None:
        """Do the host's part of one token, while the token program runs; see `DecodeHost.serve_token`.

        Raises:
            CheckpointError: an expert could not be read. The token's result is worthless; all else is right.
        """
        ids = None if self.routing is None else self.routing.decode()
        predictions = None if ids is None or self.predictions is None else self.predictions()
        begun_s = time.perf_counter()
        with nullcontext() if self.cold is None else self.cold.reads():
            self.decode_host.serve_token(ids, timeout_s, predictions)
        seconds = time.perf_counter() - begun_s
        moved = self.decode_host.stats[:, _COLUMNS].sum(axis=0)
        self._decoded += moved
        if self.ahead is not None and (ids is None or predictions is not None):
            self.ahead.observe(seconds, round(float(moved[1:5].sum())))
        if self.recorder is not None:
            self.recorder.token((self.mailbox.ids if ids is None else ids).numpy())

    def traffic(self) -> Traffic:
        """Where experts were found and what moved since loading began, without tokens that failed."""
        hits, uploads, part, cpu, cold, wasted = self._decoded.tolist()
        nbytes = self.config.expert_bytes
        decoded = Traffic(
            gpu_hits=round(hits),
            ram_hits=round(uploads + part + cpu),
            disk_hits=round(cold),
            pcie_bytes=round((uploads + part + wasted) * nbytes),
            cpu_bytes=round((cpu + cold) * nbytes),
            disk_bytes=0 if self.cold is None else self.cold.store.traffic().nbytes,
        )
        return decoded + self.prefill.traffic()

    @property
    def recorder(self) -> RoutingRecorder | None:
        """Records the router's picks; None: picks are not recorded."""
        return self.prefill.recorder

    @recorder.setter
    def recorder(self, recorder: RoutingRecorder | None) -> None:
        self.prefill.recorder = recorder

    def synchronize(self) -> None:
        """Wait for all queued work. Call it before anything else uses RAM, slots or records."""
        self.prefill.synchronize()
        self.decode_host.wait_for_copies()

    def _build_decode_host(self) -> DecodeHost:
        return DecodeHost(
            self.pool,
            self.gpu.residency,
            self.device.copier(),
            shape=self.shape,
            mailbox=self.mailbox,
            ram=self.ram.slab,
            ram_rows=self.ram.rows,
            slab_address=self.gpu.address,
            slab_stride=self.gpu.stride,
            n_experts=self.config.n_routed_experts,
            top_k=self.config.num_experts_per_tok,
            rows=self.rows,
            cold=self.cold,
            pcie_gbps=self.prefill.costs.pcie_gbps,
            cpu_gbps=self.prefill.costs.cpu_gbps,
        )

    def _residencies(self) -> list[Residency]:
        return [self.gpu.residency] if self.cold is None else [self.gpu.residency, self.cold.residency]

    def _warm(self, keys: Sequence[int]) -> None:
        self.gpu.fill(self.ram, keys[: self.gpu.n_cached])
        self._get_ready()

    def _get_ready(self) -> None:
        """End loading: check the kernels, and measure the speed of uploads."""
        check_expert_kernels(self.device, self.ram, self.gpu, self.shape, self.config.num_experts_per_tok)
        self.prefill.costs.pcie_gbps = self.decode_host.pcie_gbps = self.gpu.measure_gbps(self.ram)

    def _spread_keys(self) -> list[int]:
        return spread_keys(len(self.config.moe_layers), self.config.n_routed_experts)


def _check_room(ram: RamSlab, gpu: GpuSlab, exclusive: bool) -> None:
    room = ram.n_rows + (gpu.n_cached if exclusive else 0)
    if room < ram.n_keys:
        missing_bytes = (ram.n_keys - room) * ram.stride
        raise PlanError(
            f"{ram.n_keys} experts; RAM holds {ram.n_rows}"
            + (f" and the GPU {gpu.n_cached} more" if exclusive else "")
            + f": {missing_bytes} bytes too few",
            "Give more RAM or GPU memory.",
        )


def _check_rows(ram: RamSlab) -> None:
    least = least_rows(ram.config.num_experts_per_tok)
    if ram.n_rows < least:
        raise PlanError(
            f"RAM holds {ram.n_rows} experts; to read others from disk, {least} are needed: "
            f"{(least - ram.n_rows) * ram.stride} bytes more",
            "Give more --ram.",
        )


def _part_of(progress: Progress | None, first: int, n: int, nbytes: int) -> Progress | None:
    """A progress for a part of n experts of `nbytes` each, which begins with expert `first` of all."""
    if progress is None:
        return None

    def report(stage: str, done: int, _: int) -> None:
        progress(stage, first * nbytes + done, n * nbytes)

    return report
