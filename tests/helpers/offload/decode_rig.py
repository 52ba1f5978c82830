"""A small model's experts, a mailbox, and a Python thread that plays the GPU's part of a decode step."""

from __future__ import annotations

import random
import tempfile
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helpers.experts import Routing, random_arrays, reference
from moebox._kernels import ColdReader, HostCopier, RamRows, Reader, mailbox_shapes
from moebox.kernels.cpu import ThreadPool
from moebox.offload.decode.host_step import DecodeHost
from moebox.offload.decode.mailbox import MAILBOX_FIELDS, Mailbox
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS, Residency


@dataclass
class Spec:
    """What a rig is made of; sizes as in `DecodeHost`."""

    layers: int = 3
    n_experts: int = 10
    top_k: int = 4
    hidden: int = 64
    inner: int = 32
    slots: int = 12
    reserve: int = 3
    rows: int | None = None
    """rows of RAM; None: one for each expert"""
    spare: int | None = None
    """rows that are kept free to read into; experts that fit neither slots nor rows are in a file only"""
    seed: int = 0
    max_delay_us: float = 0.0
    cpu_gbps: float = 50.0
    threads: int = 2
    isa: str | None = None
    recall: float | None = None
    """share of a layer's picks that the GPU predicts; None: it predicts nothing"""

    @property
    def keys(self) -> int:
        """Experts of all layers."""
        return self.layers * self.n_experts


def make_mailbox(spec: Spec) -> Mailbox:
    """All tensors in plain memory; sums that the host does not overwrite show."""
    shapes = mailbox_shapes(spec.layers, spec.top_k, spec.hidden, spec.top_k)
    box = Mailbox(
        {field.name: torch.zeros(shapes[field.name], dtype=field.torch_dtype) for field in MAILBOX_FIELDS}
    )
    box.cpu_sums.fill_(7.0)
    box.one.fill_(1)
    return box


def expert_bytes(arrays: list[Tensor]) -> np.ndarray:
    """The six arrays back to back, uint8."""
    return np.concatenate([array.contiguous().view(torch.uint8).numpy().reshape(-1) for array in arrays])


class Rig:
    """A `DecodeHost` with everything around it, and checks of what it must keep."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(spec.seed)
        self.arrays = [random_arrays(spec.hidden, spec.inner, generator) for _ in range(spec.keys)]
        self.gold = np.stack([expert_bytes(arrays) for arrays in self.arrays])
        self.nbytes = self.gold.shape[1]
        self.exclusive = spec.rows is not None
        self._place(spec.rows if spec.rows is not None else spec.keys)
        self.rows = None
        if self.exclusive:
            table = self.ram_rows.numpy()
            self.rows = RamRows(table, len(self.ram), spec.spare or 0, SCORE_HALF_LIFE_TOKENS, spec.n_experts)
        self.cold = None if spec.spare is None else self._cold_reader()
        self.box = make_mailbox(spec)
        self.copier = HostCopier(spec.seed, spec.max_delay_us)
        self.pool = ThreadPool(spec.threads, pin=False)
        self.host = self.make_host()

    def _place(self, rows: int) -> None:
        """Shuffle the keys; the first ones go to RAM, as many as there are rows, and the others to slots."""
        spec, stride = self.spec, (self.nbytes + 4095) // 4096 * 4096
        self.ram = torch.zeros(rows, stride, dtype=torch.uint8)
        self.slab = torch.zeros(max(spec.slots, 1), stride, dtype=torch.uint8)
        self.ram_rows = torch.full((spec.keys,), -1, dtype=torch.int32)
        self.residency = Residency(spec.keys, spec.slots, spec.reserve, n_experts=spec.n_experts)
        keys = np.random.default_rng(spec.seed).permutation(spec.keys)
        filled = rows - (spec.spare or 0)
        for row, key in enumerate(keys[: min(filled, spec.keys)]):
            self.ram[row, : self.nbytes] = torch.from_numpy(self.gold[key])
            self.ram_rows[key] = row
        keys = keys[filled:]
        for key in keys if spec.spare is None else keys[: spec.slots - spec.reserve]:
            slot = self.residency.place(int(key))
            self.slab[slot, : self.nbytes] = torch.from_numpy(self.gold[key])

    def _cold_reader(self) -> ColdReader:
        """Write all experts to a file, which exists as long as the rig."""
        spec, stride = self.spec, self.ram.shape[1]
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        padded = np.zeros((spec.keys, stride), np.uint8)
        padded[:, : self.nbytes] = self.gold
        self.file.write(padded.tobytes())
        self.file.flush()
        self.reader = Reader(2, 4096)
        file = self.reader.add_file([self.file.name])
        extents = [([(file, key * stride, self.nbytes)], None) for key in range(spec.keys)]
        return ColdReader(self.rows, self.reader, extents)

    def delay_reads(self, seed: int) -> None:
        """Delay each read by a random time."""
        generator = np.random.default_rng(seed)
        for after in range(200):
            self.reader.inject(self.file.name, "delay", int(generator.integers(0, 2000)), after, 1)

    def make_host(self) -> DecodeHost:
        """The host's side, of what the rig holds now."""
        spec = self.spec
        return DecodeHost(
            self.pool,
            self.residency,
            self.copier,
            shape=(spec.hidden, spec.inner),
            mailbox=self.box,
            ram=self.ram,
            ram_rows=self.ram_rows,
            slab_address=self.slab.data_ptr(),
            slab_stride=self.slab.stride(0),
            n_experts=spec.n_experts,
            top_k=spec.top_k,
            rows=self.rows,
            cold=self.cold,
            pcie_gbps=50.0,
            cpu_gbps=spec.cpu_gbps,
            isa=spec.isa,
        )

    def check_places(self) -> None:
        """Each expert lies in a slot or row of its own, with its bytes. Call it after `wait_for_copies`."""
        rows, table = self.ram_rows.numpy(), self.residency.table()
        assert self.cold is not None or ((rows >= 0) | (table >= 0)).all()
        assert self.rows is None or np.array_equal(rows, self.rows.residency.table())
        for places in (rows[rows >= 0], table[table >= 0]):
            assert len(set(places.tolist())) == len(places)
        for key in range(self.spec.keys):
            if rows[key] >= 0:
                assert (self.ram[rows[key], : self.nbytes].numpy() == self.gold[key]).all()
            if table[key] >= 0:
                assert (self.slab[table[key], : self.nbytes].numpy() == self.gold[key]).all()
        if self.exclusive:
            assert not ((rows >= 0) & (table >= 0)).any()

    def all_raised(self) -> bool:
        """Whether every flag that a GPU waits for is raised."""
        self.copier.synchronize()
        return all(
            bool((flags[:, 0] == 1).all()) for flags in (self.box.listed, self.box.summed, self.box.uploaded)
        )


@dataclass
class Layer:
    """What the GPU thread found in one layer."""

    ids: list[int]
    weights: list[float]
    hits: dict[int, float]
    """slot → weight"""
    uploads: dict[int, float]
    slots: dict[int, int]
    """slot → the layer's expert whose bytes lay there while the slot was read"""
    split: tuple[int, int, float]
    """the split expert, or -1; how many of its inner rows the GPU computes; its weight"""
    hidden: Tensor
    total: Tensor


class Gpu(threading.Thread):
    """Plays the GPU's program of one token, with random delays; it ends before it routes layer `stop_at`."""

    def __init__(self, rig: Rig, seed: int, ids: np.ndarray, stop_at: int | None = None) -> None:
        super().__init__(daemon=True)
        self.rig, self.ids, self.stop_at = rig, ids, stop_at
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.layers: list[Layer] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for layer in range(self.rig.spec.layers if self.stop_at is None else self.stop_at):
                self._layer(layer)
        except BaseException as error:  # noqa: BLE001  # handed to the test's thread
            self.error = error

    def _layer(self, layer: int) -> None:
        box, spec = self.rig.box, self.rig.spec
        self._idle()
        box.ids[layer] = torch.from_numpy(self.ids[layer])
        box.weights[layer] = torch.rand(spec.top_k, generator=self.generator)
        box.hidden[layer] = torch.randn(spec.hidden, generator=self.generator).bfloat16()
        hidden, weights = box.hidden[layer].clone(), box.weights[layer].tolist()
        box.routed[layer, 0] = 1
        wait(box.listed[layer])
        slots: dict[int, int] = {}
        hits = self._read(layer, box.resident_slots[layer], box.resident_weights[layer], slots)
        wait(box.uploaded[layer])
        split = self._read_split(layer)
        self._predict(layer + 1)
        uploads = self._read(layer, box.upload_slots[layer], box.upload_weights[layer], slots)
        wait(box.summed[layer])
        total = box.cpu_sums[layer].clone()
        ids = self.ids[layer].tolist()
        self.layers.append(Layer(ids, weights, hits, uploads, slots, split, hidden, total))

    def _predict(self, layer: int) -> None:
        spec, box = self.rig.spec, self.rig.box
        if spec.recall is not None and layer < spec.layers:
            box.predicted_ids[layer] = torch.from_numpy(predict(spec, self.ids[layer], self.random))
            box.predicted[layer, 0] = 1

    def _read(self, layer: int, listed: Tensor, weights: Tensor, slots: dict[int, int]) -> dict[int, float]:
        """Read a list's slots twice, with a delay between: each holds the same expert's bytes."""
        chosen = listed[1 : 1 + int(listed[0])].tolist()
        before = [self.expert_in(layer, slot) for slot in chosen]
        self._idle()
        assert [self.expert_in(layer, slot) for slot in chosen] == before
        slots.update(zip(chosen, before, strict=True))
        return dict(zip(chosen, weights.tolist(), strict=False))

    def _read_split(self, layer: int) -> tuple[int, int, float]:
        """Read the split expert's row of RAM twice, with a delay between."""
        row, rows = self.rig.box.split_expert[layer, :2].tolist()
        if row < 0:
            return -1, 0, 0.0
        expert = self._expert_at(layer, self.rig.ram[row])
        self._idle()
        assert self._expert_at(layer, self.rig.ram[row]) == expert >= 0
        return expert, rows, float(self.rig.box.split_weight[layer, 0])

    def expert_in(self, layer: int, slot: int) -> int:
        """Which of the layer's experts lies in the slot; -1: none."""
        return self._expert_at(layer, self.rig.slab[slot])

    def _expert_at(self, layer: int, place: Tensor) -> int:
        first = layer * self.rig.spec.n_experts
        gold = self.rig.gold[first : first + self.rig.spec.n_experts]
        same = (gold == place[: self.rig.nbytes].numpy()).all(axis=1)
        return int(same.argmax()) if same.any() else -1

    def _idle(self) -> None:
        if self.rig.spec.max_delay_us:
            time.sleep(self.random.random() * self.rig.spec.max_delay_us * 1e-6)


def predict(spec: Spec, picks: np.ndarray, chance: random.Random) -> np.ndarray:
    """Each pick with a probability of `spec.recall`, else another expert: int32 [k], distinct."""
    others = chance.sample([e for e in range(spec.n_experts) if e not in picks], spec.n_experts - spec.top_k)
    named = [int(e) if chance.random() < spec.recall or not others else others.pop() for e in picks]
    return np.array(named, np.int32)


def wait(flag: Tensor, limit_s: float = 60.0) -> None:
    """Wait until a flag is raised."""
    values, end = flag.numpy(), time.monotonic() + limit_s
    while values[0] == 0:
        assert time.monotonic() < end, "the flag was never raised"
        time.sleep(0)


def check_layer(rig: Rig, layer: int, seen: Layer) -> None:
    """Each expert was served once, with its weight, and the CPU's sum is right."""
    spec = rig.spec
    weights = dict(zip(seen.ids, seen.weights, strict=True))
    on_gpu = {seen.slots[slot]: weight for slot, weight in (seen.hits | seen.uploads).items()}
    assert len(on_gpu) == len(seen.hits) + len(seen.uploads)
    assert on_gpu == {expert: weights[expert] for expert in on_gpu}
    rest = [expert for expert in seen.ids if expert not in on_gpu]
    arrays = [rig.arrays[layer * spec.n_experts + expert] for expert in rest]
    routing = Routing(
        torch.arange(len(rest) + 1).int(),
        torch.zeros(len(rest), dtype=torch.int32),
        torch.tensor([weights[e] for e in rest]),
    )
    expected = reference(arrays, routing, seen.hidden.unsqueeze(0), torch.zeros(1, spec.hidden))[0]
    total = seen.total.double() + gpu_share(rig, layer, seen)
    assert seen.split[0] < 0 or (seen.split[0] in rest and seen.split[2] == weights[seen.split[0]])
    error = (total - expected).norm()
    assert error <= 5e-3 * expected.norm()


def gpu_share(rig: Rig, layer: int, seen: Layer) -> Tensor:
    """What the GPU adds for the split expert: fp64 [H]."""
    expert, rows, weight = seen.split
    if expert < 0:
        return torch.zeros(rig.spec.hidden, dtype=torch.float64)
    gate_packed, gate_scale, up_packed, up_scale, down_packed, down_scale = rig.arrays[
        layer * rig.spec.n_experts + expert
    ]
    first = [gate_packed[:rows], gate_scale[:rows], up_packed[:rows], up_scale[:rows]]
    columns = [down_packed[:, : rows // 8].contiguous(), down_scale[:, : rows // 32].contiguous()]
    routing = Routing(torch.tensor([0, 1]).int(), torch.zeros(1, dtype=torch.int32), torch.tensor([weight]))
    hidden = seen.hidden.unsqueeze(0)
    return reference([first + columns], routing, hidden, torch.zeros(1, rig.spec.hidden))[0]


def play_token(
    rig: Rig, ids: np.ndarray, seed: int, *, injected: bool = False, timeout_s: float = 30.0
) -> Gpu:
    """Serve one token to a GPU thread, and check all that the thread saw."""
    rig.host.clear_flags()
    shown = np.zeros_like(ids) if injected else ids
    gpu = Gpu(rig, seed, shown)
    gpu.start()
    try:
        rig.host.serve_token(torch.from_numpy(ids) if injected else None, timeout_s)
    finally:
        gpu.join(60)
    assert not gpu.is_alive()
    if gpu.error is not None:
        raise gpu.error
    for layer, seen in enumerate(gpu.layers):
        seen.ids = ids[layer].tolist()
        check_layer(rig, layer, seen)
    return gpu


def random_ids(spec: Spec, generator: np.random.Generator) -> np.ndarray:
    """int32 [L, k], distinct within a layer, low ids more often."""
    chance = 1.0 / np.arange(1, spec.n_experts + 1)
    chance /= chance.sum()
    rows = [generator.choice(spec.n_experts, spec.top_k, replace=False, p=chance) for _ in range(spec.layers)]
    return np.array(rows, dtype=np.int32)
