"""Prompts on two roads: the same answers wherever experts lie, tables that are right, and no races."""

import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.offload.tiers import (
    EXPERTS,
    FIRST,
    LAYERS,
    TOP_K,
    Oracle,
    Races,
    RecordingDevice,
    build,
    check_places,
    random_chunk,
    small_config,
    watch_cpu,
)
from moebox.errors import DeviceError
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.prefill import layer as prefill
from moebox.offload.prefill.admission import ExclusiveAdmissions
from moebox.offload.prefill.token_expert_pairs import recent_use, sort_pairs

PLACEMENTS = [(0, False), (4, False), (20, False), (64 + 4, False), (4, True), (24, True)]


@pytest.fixture(autouse=True)
def one_thread():
    """One thread: at these sizes torch's threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle():
    return Oracle(small_config())


def relative_error(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "exclusive"), PLACEMENTS)
@pytest.mark.parametrize("seed", [1, 2])
def test_same_answers_wherever_experts_lie(oracle, slots, exclusive, seed):
    generator = torch.Generator().manual_seed(seed)
    tiers = build(StandInDevice(seed, max_delay_us=100), slots, exclusive)
    for n_tokens in (1, 90, 2, 40):
        for layer in range(FIRST, FIRST + LAYERS):
            chunk = random_chunk(n_tokens, generator, skew=seed)
            out = tiers.forward(layer, *chunk)
            assert out.dtype == torch.float32
            assert relative_error(out, oracle.forward(layer, *chunk)) < 5e-3
        check_places(tiers)


def test_all_resident_needs_neither_road(oracle):
    tiers = build(StandInDevice(), LAYERS * EXPERTS + TOP_K)
    chunk = random_chunk(50, torch.Generator().manual_seed(3))
    assert relative_error(tiers.forward(FIRST, *chunk), oracle.forward(FIRST, *chunk)) < 5e-3
    tiers.synchronize()
    (record,) = tiers.prefill.records
    assert (record.uploads, record.cpu, record.floor_s) == (0, 0, 0.0)
    assert record.residents == len(chunk[0].unique())


@pytest.mark.parametrize("faster", ["cpu", "uploads"])
def test_the_faster_road_gets_more(oracle, monkeypatch, faster):
    tiers = build(StandInDevice(max_delay_us=0), 0)
    slow = "pcie_gbps" if faster == "cpu" else "cpu_gbps"
    tiers.prefill.costs = replace(tiers.prefill.costs, **{"pcie_gbps": 1.0, "cpu_gbps": 1.0, slow: 0.01})
    monkeypatch.setattr(tiers.prefill.costs, "learn_cpu", lambda *_: None)
    chunk = random_chunk(60, torch.Generator().manual_seed(4))
    assert relative_error(tiers.forward(FIRST, *chunk), oracle.forward(FIRST, *chunk)) < 5e-3
    tiers.synchronize()
    (record,) = tiers.prefill.records
    assert record.cpu + record.uploads == len(chunk[0].unique())
    assert getattr(record, faster) > 0.6 * len(chunk[0].unique())


def test_uploads_take_the_busiest(monkeypatch):
    taken = []
    forward = prefill.cpu.experts_forward

    def spy(pool, experts, offsets, *rest):
        taken.extend(np.diff(offsets).tolist())
        forward(pool, experts, offsets, *rest)

    monkeypatch.setattr(prefill.cpu, "experts_forward", spy)
    tiers = build(StandInDevice(max_delay_us=0), 0)
    tiers.prefill.costs.pcie_gbps, tiers.prefill.costs.cpu_gbps = 0.01, 0.01
    ids, *rest = random_chunk(90, torch.Generator().manual_seed(5), skew=3)
    tiers.forward(FIRST, ids, *rest)
    counts = ids.reshape(-1).bincount()
    assert 0 < len(taken) < EXPERTS
    assert sorted(taken) == sorted(counts[counts > 0].tolist())[: len(taken)]


@pytest.mark.parametrize(("slots", "exclusive"), PLACEMENTS)
def test_no_races(monkeypatch, slots, exclusive):
    races = Races()
    tiers = build(RecordingDevice(races), slots, exclusive)
    races.steps.clear()  # of loading, which has ended
    watch_cpu(races, tiers, monkeypatch)
    tiers.prefill.costs.pcie_gbps = tiers.prefill.costs.cpu_gbps = 1.0
    generator = torch.Generator().manual_seed(6)
    for n_tokens, layer in itertools.product((30, 20), range(FIRST, FIRST + LAYERS)):
        tiers.forward(layer, *random_chunk(n_tokens, generator, skew=2))
    tiers.synchronize()
    assert races.find() == []
    records = tiers.prefill.records
    assert slots > LAYERS * EXPERTS or (
        max(record.uploads for record in records) > UPLOAD_GROUP and any(record.cpu for record in records)
    )


def test_the_race_detector_finds_a_missing_wait(monkeypatch):
    races = Races()
    tiers = build(RecordingDevice(races), 0)
    races.steps.clear()
    tiers.prefill.costs.cpu_gbps = 1e-6
    monkeypatch.setattr(tiers.device.uploads, "wait", lambda event: None)
    tiers.forward(FIRST, *random_chunk(60, torch.Generator().manual_seed(7)))
    assert "uploads and compute" in races.find()


def test_what_prefill_routed_stays_in_the_cache():
    tiers = build(StandInDevice(max_delay_us=0), 24)
    tiers.prefill.costs.cpu_gbps = 1e-6  # the CPU is so slow that all are uploaded, and so may be admitted
    ids = torch.arange(TOP_K).expand(40, TOP_K).contiguous()
    tiers.forward(FIRST, ids + 20, *random_chunk(40, torch.Generator())[1:])
    tiers.forward(FIRST + 1, ids + 9, *random_chunk(40, torch.Generator())[1:])
    residency = tiers.gpu.residency
    kept = [*range(20, 20 + TOP_K), *range(EXPERTS + 9, EXPERTS + 9 + TOP_K)]
    assert all(residency.slot(key) >= 0 for key in kept)
    check_places(tiers)


def test_a_weaker_expert_is_not_admitted():
    tiers = build(StandInDevice(max_delay_us=0), 24)
    tiers.prefill.costs.cpu_gbps = 1e-6
    residency = tiers.gpu.residency
    before = residency.table()
    residents = np.nonzero(before >= 0)[0].astype(np.int32)
    residency.use(residents, np.full(len(residents), 1e4, np.float32))
    tiers.forward(FIRST, *random_chunk(10, torch.Generator().manual_seed(8)))
    check_places(tiers)
    assert np.array_equal(residency.table(), before)


@pytest.mark.parametrize("exclusive", [False, True])
def test_failed_copy(exclusive, monkeypatch):
    tiers = build(StandInDevice(max_delay_us=50), 24, exclusive)
    tiers.prefill.costs.cpu_gbps = 1e-6
    copies = itertools.count()
    copy = tiers.device.uploads.copy

    def fail(target, source):
        copy(target, source if next(copies) != 9 else source[:5])

    monkeypatch.setattr(tiers.device.uploads, "copy", fail)
    with pytest.raises(DeviceError, match="a copy failed"):
        tiers.forward(FIRST, *random_chunk(80, torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_interrupt_leaves_all_experts_whole(oracle, exclusive, steps, monkeypatch):
    tiers = build(StandInDevice(max_delay_us=50), 24, exclusive)
    tiers.prefill.costs.cpu_gbps = 1e-6
    chunk = random_chunk(80, torch.Generator().manual_seed(10))
    calls = itertools.count(1)
    copy_all = tiers.device.uploads.copy_all

    def interrupt(pairs):
        if next(calls) == steps:
            copy_all(pairs[: len(pairs) // 2])
            raise KeyboardInterrupt
        copy_all(pairs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiers.device.uploads, "copy_all", interrupt)
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, *chunk)
    check_places(tiers)
    assert relative_error(tiers.forward(FIRST, *chunk), oracle.forward(FIRST, *chunk)) < 5e-3


@pytest.mark.parametrize("name", ["copy", "record", "arrived", "all"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_an_interrupt_while_a_victim_moves_leaves_all_experts_whole(oracle, name, nth, monkeypatch):
    """In exclusive mode, behind each step that moves an evicted expert from its slot to a row."""
    tiers = build(StandInDevice(max_delay_us=50), 24, True)
    tiers.prefill.costs.pcie_gbps, tiers.prefill.costs.cpu_gbps = 100.0, 1e-3
    generator = torch.Generator().manual_seed(5)
    place = ExclusiveAdmissions._move
    moves = itertools.count(1)

    def move(admissions):
        if next(moves) != nth:
            return place(admissions)
        if name == "all":
            place(admissions)
            raise KeyboardInterrupt
        owner = admissions.rows if name == "arrived" else admissions.gpu.device.downloads
        step = getattr(owner, name)

        def interrupt(*arguments):
            step(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            return place(admissions)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ExclusiveAdmissions, "_move", move)
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, *random_chunk(90, generator, skew=3))
    check_places(tiers)
    for _ in range(3):
        chunk = random_chunk(200, generator, skew=0.2)
        for layer in range(FIRST, FIRST + LAYERS):
            assert relative_error(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk)) < 5e-3


@given(st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_pairs_are_sorted(n_tokens, seed):
    generator = np.random.default_rng(seed)
    ids = np.argsort(generator.random((n_tokens, 12)))[:, :3]
    slots = np.where(generator.random(12) < 0.4, 1, -1).astype(np.int32)
    pairs = sort_pairs(ids, (slots < 0).astype(np.int32), 2)
    n_residents = pairs.starts[1]
    assert sorted(pairs.experts) == sorted(set(ids.flat))
    assert [slots[expert] >= 0 for expert in pairs.experts] == [
        place < n_residents for place in range(len(pairs.experts))
    ]
    assert (np.diff(pairs.counts[n_residents:]) <= 0).all()
    flat = ids.reshape(-1)
    for expert, begin, end in zip(pairs.experts, pairs.offsets[:-1], pairs.offsets[1:], strict=True):
        assert (flat[pairs.order[begin:end]] == expert).all()
        assert (pairs.tokens[begin:end] == pairs.order[begin:end] // 3).all()
        assert pairs.tokens[begin:end].tolist() == np.nonzero(ids == expert)[0].tolist()


def test_use_counts_as_if_decoded():
    tiers = build(StandInDevice(), 8)
    residency = tiers.gpu.residency
    ids = random_chunk(37, torch.Generator().manual_seed(11))[0].numpy()
    for row in ids:
        residency.tick += 1
        residency.use(row.astype(np.int32))
    assert np.allclose(residency.scores()[:EXPERTS], recent_use(ids, EXPERTS), rtol=1e-4)


def test_a_late_host_does_not_count_against_the_uploads(monkeypatch):
    tiers = build(StandInDevice(max_delay_us=0), 0)
    tiers.prefill.costs.cpu_gbps = 1e-9
    learned = []
    monkeypatch.setattr(tiers.prefill.costs, "learn_upload", learned.append)
    experts_many = tiers.device.ops.experts_many
    calls = itertools.count()

    def compile_first(*call):
        if next(calls) == 0:
            time.sleep(0.3)
        experts_many(*call)

    monkeypatch.setattr(tiers.device, "ops", SimpleNamespace(experts_many=compile_first))
    _, *rest = random_chunk(EXPERTS, torch.Generator().manual_seed(12))
    every = (torch.arange(EXPERTS)[:, None] + torch.arange(TOP_K)) % EXPERTS
    tiers.forward(FIRST, every, *rest)
    tiers.synchronize()
    assert tiers.prefill.records[0].upload_s > 0.3
    assert learned[0] < 0.3 / EXPERTS
