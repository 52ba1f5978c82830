"""Small tiers on a stand-in device, the results that they should give, and a detector of races."""

from __future__ import annotations

import threading
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from helpers import experts as arithmetic
from moebox._kernels import Reader
from moebox.config import ModelConfig
from moebox.kernels import cpu
from moebox.offload.checkpoint.layout import ExpertLayout
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.disk.store import ExpertStore
from moebox.offload.disk.synthetic import SyntheticSource
from moebox.offload.experts import group_by_expert
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.memory.ram_slab import RamSlab, row_tensors
from moebox.offload.prefill import layer as prefill

EXPERTS, TOP_K, LAYERS = 32, 4, 2
FIRST = 1
"""Index of the first MoE layer in the model."""


def small_config(**changes) -> ModelConfig:
    """Two MoE layers of 32 experts, H 64, I 32, top 4."""
    values = {
        "model_type": "kimi_k2", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "moe_intermediate_size": 32, "num_hidden_layers": FIRST + LAYERS, "num_attention_heads": 2,
        "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": TOP_K,
        "first_k_dense_replace": FIRST, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
        "v_head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 5e4, "max_position_embeddings": 512,
    }  # fmt: skip
    return ModelConfig(**(values | changes))


@cache
def all_bytes(config: ModelConfig) -> Tensor:
    """The bytes of all experts that `fill_synthetic` writes: uint8 [L * E, nbytes]."""
    source = SyntheticSource(config, 0)
    rows = np.empty((config.n_keys, config.expert_bytes), np.uint8)
    for key, row in enumerate(rows):
        source.read(key, row)
    return torch.from_numpy(rows)


def build(device, slots: int, exclusive: bool = False, threads: int = 1, **changes) -> GpuExperts:
    """Filled tiers; in exclusive mode RAM has the fewest rows possible."""
    config = small_config(**changes)
    reserve = min(config.num_experts_per_tok, slots // 2)
    rows = config.n_keys - (slots - reserve if exclusive else 0)
    ram = RamSlab(config, rows, device)
    tiers = GpuExperts.build(device, cpu.ThreadPool(threads, pin=False), ram, slots, exclusive)
    tiers.fill_synthetic()
    return tiers


def build_cold(device, file: Path, slots: int, rows: int, n_experts: int = EXPERTS) -> GpuExperts:
    """Filled tiers that do not hold all experts; a file, written here, has them all."""
    config = small_config(n_routed_experts=n_experts)
    experts = all_bytes(config)
    file.write_bytes(experts.numpy().tobytes())
    reader = Reader(2, 4096)
    number = reader.add_file([str(file)])
    nbytes = experts.shape[1]
    runs = [[(number, key * nbytes, nbytes)] for key in range(len(experts))]
    store = ExpertStore(SimpleNamespace(config=config), reader, runs, None, ())
    ram = RamSlab(config, rows, device)
    pool = cpu.ThreadPool(1, pin=False)
    tiers = GpuExperts.build(device, pool, ram, slots, exclusive=True, store=store)
    tiers.load(store)
    assert tiers.cold is not None
    return tiers


class Oracle:
    """fp64 results, from the experts' source."""

    def __init__(self, config: ModelConfig) -> None:
        layout = ExpertLayout(config)
        self.n_experts = config.n_routed_experts
        self.arrays = [row_tensors(row, layout) for row in all_bytes(config)]

    def forward(self, layer: int, ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """As `Experts.forward`, in fp64."""
        chosen, offsets, tokens, order = group_by_expert(ids.numpy())
        routing = arithmetic.Routing(
            torch.from_numpy(offsets), torch.from_numpy(tokens), weights.reshape(-1)[torch.from_numpy(order)]
        )
        first = (layer - FIRST) * self.n_experts
        arrays = [self.arrays[first + expert] for expert in chosen]
        return arithmetic.reference(arrays, routing, hidden, torch.zeros(hidden.shape))


def random_chunk(n_tokens: int, generator: torch.Generator, skew: float = 1.0, n_experts: int = EXPERTS):
    """Ids [T, 4], weights and hidden states. The larger the skew, the less evenly experts are used."""
    popularity = torch.rand(n_experts, generator=generator) ** skew
    ids = (torch.rand(n_tokens, n_experts, generator=generator) * popularity).topk(TOP_K).indices
    weights = torch.rand(n_tokens, TOP_K, generator=generator)
    return ids, weights, torch.randn(n_tokens, 64, generator=generator).bfloat16()


def check_places(tiers: GpuExperts) -> None:
    """Check that experts lie, whole, where the tables say, and in exclusive mode in one place only."""
    tiers.synchronize()
    table, rows = tiers.gpu.residency.table(), tiers.ram.rows
    assert tiers.cold is not None or tiers.gpu.residency.n_free >= tiers.gpu.residency.reserve
    for key, (slot, row) in enumerate(zip(table.tolist(), rows.tolist(), strict=True)):
        expected = all_bytes(tiers.config)[key]
        if tiers.cold is not None:
            assert slot < 0 or row < 0, key
            assert tiers.cold.residency.slot(key) == row, key
        elif tiers.rows is not None:
            assert (slot < 0) != (row < 0), key
            assert tiers.rows.row(key) == row, key
        else:
            assert row >= 0
        for slab, place in ((tiers.gpu.slab, slot), (tiers.ram.slab, row)):
            assert place < 0 or torch.equal(slab[place, : len(expected)], expected), key
    for places in (table[table >= 0], rows[rows >= 0]):
        assert len(set(places.tolist())) == len(places)


def decode(tiers, ids, weights, hidden):
    """Decode a token with the inputs `hidden` [L, H], by a program like the runtime's: fp32 [L, H]."""
    box, ops, device = tiers.mailbox, tiers.device.ops, tiers.device
    parts = [torch.zeros(LAYERS, hidden.shape[1]) for _ in range(2)]

    def program():
        for layer in range(LAYERS):
            x = hidden[layer]
            ops.post(
                ids[layer].int(), weights[layer], x,
                box.ids[layer], box.weights[layer], box.hidden[layer], box.routed[layer],
            )  # fmt: skip
            ops.wait(box.listed[layer])
            ops.experts_one(
                tiers.gpu.slab, tiers.shape, box.resident_slots[layer], box.resident_weights[layer],
                x, parts[0][layer],
            )  # fmt: skip
            ops.wait(box.uploaded[layer])
            ops.experts_one(
                tiers.gpu.slab, tiers.shape, box.upload_slots[layer], box.upload_weights[layer],
                x, parts[1][layer],
            )  # fmt: skip
            ops.wait(box.summed[layer])

    launch = device.compile(program)
    tiers.begin_token()
    launch.start()
    tiers.serve_token()
    launch.finish()
    return parts[0] + parts[1] + box.cpu_sums


class Races:
    """Finds races by vector clocks of the host and the streams, and by what each step read and wrote."""

    def __init__(self) -> None:
        self.clocks: defaultdict[str, dict[str, int]] = defaultdict(dict)
        self.steps: list[tuple[str, int, dict[str, int], list[Tensor], list[Tensor]]] = []

    def join(self, actor: str, clock: dict[str, int]) -> None:
        """`actor`, the host or a stream, goes on after all steps that `clock` knows."""
        mine = self.clocks[actor]
        for stream, position in clock.items():
            mine[stream] = max(mine.get(stream, 0), position)

    def step(self, actor: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Record a step: of the host, of a stream on which the host queued it, or of the CPU's thread."""
        if actor != "cpu":
            self.join(actor, self.clocks["host"])
        clock = self.clocks[actor]
        clock[actor] = clock.get(actor, 0) + 1
        self.steps.append((actor, clock[actor], dict(clock), reads, writes))

    def find(self) -> list[str]:
        """Pairs of steps that use the same memory in no certain order, and of which one writes."""
        found = []
        for later, (actor, _, clock, reads, writes) in enumerate(self.steps):
            for other, position, _, other_reads, other_writes in self.steps[:later]:
                if other == actor or clock.get(other, 0) >= position:
                    continue
                if (
                    _overlap(writes, other_writes)
                    or _overlap(writes, other_reads)
                    or _overlap(reads, other_writes)
                ):
                    found.append(f"{actor} and {other}")
        return found


def _overlap(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(
        a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
        for a in some
        for b in others
    )


class _Event:
    def __init__(self, races: Races, real, clock: dict[str, int]) -> None:
        self.races, self.real, self.clock = races, real, clock

    def done(self) -> bool:
        return self.real.done()

    def synchronize(self) -> None:
        self.real.synchronize()
        main = threading.current_thread() is threading.main_thread()
        self.races.join("host" if main else "cpu", self.clock)

    def seconds_since(self, earlier) -> float:
        """Check that the host knows that both events are done, as a GPU's events do."""
        known = self.races.clocks["host"]
        for event in (self, earlier):
            assert all(known.get(stream, 0) >= position for stream, position in event.clock.items())
        return self.real.seconds_since(earlier.real)


class _Stream:
    def __init__(self, races: Races, name: str, real) -> None:
        self.races, self.name, self.real = races, name, real

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.races.step(self.name, [source], [target])
        self.real.copy(target, source)

    def copy_all(self, pairs) -> None:
        for pair in pairs:
            self.copy(*pair)

    def record(self) -> _Event:
        return _Event(self.races, self.real.record(), dict(self.races.clocks[self.name]))

    def wait(self, event: _Event) -> None:
        self.races.join(self.name, event.clock)
        self.real.wait(event.real)


class RecordingThread:
    """Takes the place of `PrefillExperts.cpu_thread`, and records what the thread knows."""

    def __init__(self, races: Races, real) -> None:
        self.races, self.real = races, real

    def submit(self, task, *arguments):
        """Begin a task, which knows all steps that the host knows."""
        self.races.join("cpu", self.races.clocks["host"])
        future = self.real.submit(task, *arguments)
        return SimpleNamespace(result=lambda: self._result(future))

    def _result(self, future):
        result = future.result()
        self.races.join("host", self.races.clocks["cpu"])
        return result


def watch_cpu(races: Races, tiers: GpuExperts, monkeypatch) -> None:
    """Record the CPU's work on prompts, too."""
    rows = []
    forward, expert = prefill.cpu.experts_forward, tiers.ram.expert

    def watched_expert(row):
        rows.append(tiers.ram.slab[row])
        return expert(row)

    def watched_forward(pool, experts, offsets, tokens, weights, hidden, out):
        races.step("cpu", [*rows, hidden], [out])
        rows.clear()
        forward(pool, experts, offsets, tokens, weights, hidden, out)

    monkeypatch.setattr(tiers.ram, "expert", watched_expert)
    monkeypatch.setattr(prefill.cpu, "experts_forward", watched_forward)
    tiers.prefill.cpu_thread = RecordingThread(races, tiers.prefill.cpu_thread)


class _Ops:
    """All operations; only `experts_many` is recorded."""

    def __init__(self, real, experts_many) -> None:
        self._real, self.experts_many = real, experts_many

    def __getattr__(self, name):
        return getattr(self._real, name)


class RecordingDevice(StandInDevice):
    """A stand-in that records each step's memory, as if the device computed while the host goes on."""

    def __init__(self, races: Races, seed: int = 0) -> None:
        super().__init__(seed, max_delay_us=0)
        self.races = races
        self.uploads = _Stream(races, "uploads", self.uploads)
        self.downloads = _Stream(races, "downloads", self.downloads)
        real = self.ops
        self.ops = _Ops(real, lambda *call: self._experts_many(real, *call))

    def _experts_many(
        self, real, slab, shape, slots, offsets, tokens, weights, hidden, out, counts=None
    ) -> None:
        reads = [*slab[slots.long()].unbind(), slots, offsets, tokens, weights, hidden]
        reads[: len(slots)] = [slab[slot] for slot in slots.tolist()]
        self.races.step("compute", reads, [out])
        real.experts_many(slab, shape, slots, offsets, tokens, weights, hidden, out, counts)

    def mark(self) -> _Event:
        return _Event(self.races, super().mark(), dict(self.races.clocks["compute"]))

    def compute_waits(self, event: _Event) -> None:
        self.races.join("compute", event.clock)
        event.real.synchronize()

    def send(self, source: Tensor) -> Tensor:
        self.races.step("host", [], [source])  # the host has just filled it
        self.races.step("compute", [source], [])
        return super().send(source)

    def fetch(self, target: Tensor, source: Tensor) -> None:
        self.races.step("compute", [source], [target])
        super().fetch(target, source)

    def synchronize(self) -> None:
        self.uploads.record().synchronize()
        self.downloads.record().synchronize()
        self.mark().synchronize()
