"""Uploads ahead of the next layer: used if they are right, harmless if they are not, and without races."""

import itertools

import numpy as np
import pytest
import torch

from helpers.offload.tiers import (
    EXPERTS,
    FIRST,
    TOP_K,
    Oracle,
    Races,
    RecordingDevice,
    all_bytes,
    build,
    check_places,
    random_chunk,
    small_config,
)
from moebox.errors import DeviceError
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.memory.gpu_slab import RING_SLOTS, UPLOAD_GROUP
from moebox.offload.prefill.upload_ring import CERTAIN, Ring

LAYERS = 4
DEEP = {"num_hidden_layers": FIRST + LAYERS}
MANY = CERTAIN * EXPERTS // TOP_K
"""The fewest tokens with which experts are uploaded ahead."""


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def oracle():
    return Oracle(small_config(**DEEP))


def assert_close(out, expected):
    assert (out.double() - expected).norm() < 5e-3 * expected.norm()


def narrow_chunk(n_tokens, generator):
    """Tokens that all use the same experts."""
    ids = torch.randperm(EXPERTS, generator=generator)[:TOP_K]
    return ids.expand(n_tokens, TOP_K).contiguous(), *random_chunk(n_tokens, generator)[1:]


def all_records(tiers):
    tiers.synchronize()
    return list(tiers.prefill.records)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [0, 4, 40, 100])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_answers(oracle, slots, seed):
    generator = torch.Generator().manual_seed(seed)
    tiers = build(StandInDevice(seed, max_delay_us=100), slots, **DEEP)
    for n_tokens in (MANY, 90, 5, MANY + 10):
        for layer in range(FIRST, FIRST + LAYERS):
            chunk = random_chunk(n_tokens, generator, skew=seed)
            assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))
        records = all_records(tiers)[-LAYERS:]
        assert [record.early > 0 for record in records[1:]] == [n_tokens >= MANY] * (LAYERS - 1)
        assert records[0].early == records[0].wasted == 0
        check_places(tiers)


@pytest.mark.parametrize(("n_tokens", "early"), [(MANY, RING_SLOTS), (MANY - 1, 0)])
def test_every_upload_ahead_counts_once(oracle, n_tokens, early):
    tiers = build(StandInDevice(max_delay_us=0), 0, **DEEP)
    every = (torch.arange(n_tokens)[:, None] + torch.arange(TOP_K)) % EXPERTS
    for layer in range(FIRST, FIRST + LAYERS):
        chunk = (every, *random_chunk(n_tokens, torch.Generator().manual_seed(layer))[1:])
        assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))
    records = all_records(tiers)
    assert [record.early for record in records] == [0] + [early] * (LAYERS - 1)
    used = min(n_tokens + TOP_K - 1, EXPERTS)
    for record in records:
        assert record.uploads + record.cpu == used
        assert record.wasted == 0
        assert record.uploads >= record.early
        assert record.upload_s > 0 or not record.uploads


def test_nothing_is_uploaded_twice(monkeypatch):
    tiers = build(StandInDevice(max_delay_us=0), 0, **DEEP)
    sources = []
    copy = tiers.device.uploads.copy
    monkeypatch.setattr(
        tiers.device.uploads,
        "copy",
        lambda target, source: (sources.append(source.data_ptr()), copy(target, source)),
    )
    for layer in range(FIRST, FIRST + LAYERS):
        tiers.forward(layer, *random_chunk(90, torch.Generator().manual_seed(layer)))
    assert sum(record.early for record in all_records(tiers)) > 0
    assert len(sources) == len(set(sources))
    assert len(sources) == sum(record.uploads + record.wasted for record in tiers.prefill.records)


@pytest.mark.parametrize("slots", [0, 40])
def test_an_expert_without_tokens_is_wasted(oracle, slots):
    generator = torch.Generator().manual_seed(4)
    tiers = build(StandInDevice(4, max_delay_us=50), slots, **DEEP)
    for layer in range(FIRST, FIRST + LAYERS):
        chunk = narrow_chunk(MANY, generator)
        assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))
    for record in all_records(tiers)[1:]:
        assert record.early + record.wasted == RING_SLOTS
        assert record.wasted >= RING_SLOTS - TOP_K
    check_places(tiers)


def test_exclusive_tiers_upload_nothing_ahead(oracle):
    generator = torch.Generator().manual_seed(5)
    tiers = build(StandInDevice(5, max_delay_us=50), 24, exclusive=True, **DEEP)
    for layer in range(FIRST, FIRST + LAYERS):
        chunk = random_chunk(90, generator)
        assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))
    assert all(record.early == record.wasted == 0 for record in all_records(tiers))
    check_places(tiers)


def test_the_highest_scores_are_uploaded_first():
    tiers = build(StandInDevice(max_delay_us=0), 0, **DEEP)
    busy = [EXPERTS + expert for expert in range(31, 31 - RING_SLOTS, -1)]
    tiers.gpu.residency.use(np.array(busy, np.int32), np.arange(len(busy), 0, -1, dtype=np.float32))
    tiers.forward(FIRST, *random_chunk(MANY, torch.Generator().manual_seed(6)))
    groups = tiers.prefill.next_layer.take()
    assert [key for group in groups for key in group.slots] == busy


def test_experts_uploaded_ahead_are_admitted_like_others():
    tiers = build(StandInDevice(max_delay_us=0), 24 + TOP_K, **DEEP)
    tiers.prefill.costs.cpu_gbps = 1e-6
    generator = torch.Generator().manual_seed(7)
    tiers.forward(FIRST, *random_chunk(MANY, generator))
    (first, *_), *_ = (list(group.slots) for group in tiers.prefill.next_layer._groups)
    ids = torch.tensor([first - EXPERTS, *range(TOP_K - 1)]).expand(MANY, TOP_K).contiguous()
    tiers.forward(FIRST + 1, ids, *random_chunk(MANY, generator)[1:])
    slot = tiers.gpu.residency.slot(first)
    assert 0 <= slot < tiers.gpu.n_slots
    check_places(tiers)


def test_uploads_ahead_belong_to_the_layer_that_uses_them(oracle):
    generator = torch.Generator().manual_seed(14)
    tiers = build(StandInDevice(14, max_delay_us=200), 0, **DEEP)
    tiers.forward(FIRST, *random_chunk(MANY, generator))
    group, *others = tiers.prefill.next_layer._groups
    ids = torch.tensor([key - EXPERTS for key in group.slots][:TOP_K]).expand(MANY, TOP_K).contiguous()
    chunk = (ids, *random_chunk(MANY, generator)[1:])
    assert_close(tiers.forward(FIRST + 1, *chunk), oracle.forward(FIRST + 1, *chunk))
    record = all_records(tiers)[1]
    assert (record.early, record.uploads, record.cpu) == (TOP_K, TOP_K, 0)
    assert record.wasted == RING_SLOTS - TOP_K
    assert record.upload_s == others[-1].end.seconds_since(group.begin) > 0
    assert record.floor_s > 0
    assert record.pcie_gbps == pytest.approx(RING_SLOTS * record.expert_bytes / record.upload_s / 1e9)


def forward_watched(tiers, n_tokens, layers, generator, make=random_chunk):
    for layer in range(FIRST, FIRST + layers):
        tiers.forward(layer, *make(n_tokens, generator))


@pytest.mark.parametrize("slots", [0, 12, 40])
def test_no_races(slots):
    races = Races()
    tiers = build(RecordingDevice(races), slots, **DEEP)
    races.steps.clear()  # of loading
    tiers.prefill.costs.pcie_gbps, tiers.prefill.costs.cpu_gbps = 1.0, 1e-6
    generator = torch.Generator().manual_seed(8)
    forward_watched(tiers, MANY, LAYERS, generator)
    forward_watched(tiers, MANY, 2, generator, narrow_chunk)  # the prompt ends after two layers
    forward_watched(tiers, MANY, 2, generator)
    assert races.find() == []
    records = all_records(tiers)
    assert sum(record.early for record in records) > LAYERS * UPLOAD_GROUP
    assert any(record.wasted for record in records)


def test_the_race_detector_finds_a_forgotten_reader(monkeypatch):
    races = Races()
    tiers = build(RecordingDevice(races), 0, **DEEP)
    races.steps.clear()
    tiers.prefill.costs.cpu_gbps = 1e-6
    monkeypatch.setattr(Ring, "read_until", lambda *_: None)
    forward_watched(tiers, MANY, 2, torch.Generator().manual_seed(9))
    assert "uploads and compute" in races.find()


def test_a_prompt_that_ends_between_layers(oracle):
    generator = torch.Generator().manual_seed(10)
    tiers = build(StandInDevice(10, max_delay_us=200), 12, **DEEP)
    forward_watched(tiers, MANY, 2, generator)
    for layer in range(FIRST, FIRST + LAYERS):
        chunk = random_chunk(MANY, generator)
        assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))
    records = all_records(tiers)
    assert (records[2].layer, records[2].early, records[2].wasted) == (0, 0, RING_SLOTS)
    check_places(tiers)


def test_other_experts_in_ram_after_a_prompt_that_ended_between_layers():
    generator = torch.Generator().manual_seed(11)
    tiers = build(StandInDevice(11, max_delay_us=200), 0, **DEEP)
    forward_watched(tiers, MANY, 1, generator)
    ends = [group.end for group in tiers.prefill.next_layer._groups]
    tiers.synchronize()
    assert len(ends) == RING_SLOTS // UPLOAD_GROUP
    assert all(end.done() for end in ends)
    tiers.fill_synthetic(seed=1)
    assert not torch.equal(tiers.ram.slab[0, : tiers.config.expert_bytes], all_bytes(tiers.config)[0])
    fresh = build(StandInDevice(max_delay_us=0), 0, **DEEP)
    fresh.fill_synthetic(seed=1)
    chunk = random_chunk(MANY, generator)
    assert_close(tiers.forward(FIRST + 1, *chunk), fresh.forward(FIRST + 1, *chunk))


def interrupt_at(step, tiers, patch):
    calls, copy_all = itertools.count(1), tiers.device.uploads.copy_all

    def interrupt(pairs):
        if next(calls) == step:
            copy_all(pairs[: len(pairs) // 2])
            raise KeyboardInterrupt
        copy_all(pairs)

    patch.setattr(tiers.device.uploads, "copy_all", interrupt)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 9))
def test_an_interrupt(oracle, step, monkeypatch):
    tiers = build(StandInDevice(step, max_delay_us=50), 12, **DEEP)
    tiers.prefill.costs.cpu_gbps = 1e-6
    chunk = random_chunk(MANY, torch.Generator().manual_seed(12))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(step, tiers, patch)
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, *chunk)
    assert tiers.prefill.next_layer.take() == []
    check_places(tiers)
    for layer in range(FIRST, FIRST + LAYERS):
        assert_close(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk))


def test_a_failed_copy_of_an_upload_ahead_is_raised(monkeypatch):
    tiers = build(StandInDevice(max_delay_us=50), 0, **DEEP)
    start, copy = tiers.prefill.next_layer.start, tiers.device.uploads.copy

    def fail(keys):
        monkeypatch.setattr(tiers.device.uploads, "copy", lambda target, source: copy(target, source[:5]))
        start(keys)

    monkeypatch.setattr(tiers.prefill.next_layer, "start", fail)
    chunk = random_chunk(MANY, torch.Generator().manual_seed(13))
    with pytest.raises(DeviceError, match="a copy failed"):
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, *chunk)
