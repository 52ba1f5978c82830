"""Cold experts, where RAM and GPU do not hold the model: answers, failing reads, and which rows are kept."""

import itertools

import numpy as np
import pytest
import torch

from helpers.offload.decode_rig import Gpu, Rig, Spec, play_token, random_ids
from helpers.offload.tiers import (
    EXPERTS,
    FIRST,
    LAYERS,
    TOP_K,
    Oracle,
    Races,
    RecordingDevice,
    build_cold,
    check_places,
    decode,
    random_chunk,
    small_config,
    watch_cpu,
)
from moebox._kernels import ColdReader, ReadFailure
from moebox.errors import CheckpointError, PlanError
from moebox.offload.decode.host_step import FIELDS
from moebox.offload.device.stand_in import StandInDevice

EIO = 5
COLD = Spec(slots=6, reserve=3, rows=16, spare=4)
PLACES = [(0, 12), (0, 40), (4, 20), (12, 12), (20, 30)]
"""(slots, rows) for 64 experts."""


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


def field(rig, name):
    """A figure of the last token, by layer."""
    return rig.host.stats[:, FIELDS.index(name)]


def relative_error(out, expected):
    return float((out.double() - expected).norm() / expected.norm())


def test_what_is_used_stays_in_memory():
    """If tokens pick the same experts, the later tokens read nothing."""
    rig, ids = Rig(COLD), random_ids(COLD, np.random.default_rng(0))
    play_token(rig, ids, 0)
    assert (field(rig, "cold") > 0).any()
    assert (field(rig, "read_s")[field(rig, "cold") > 0] > 0).all()
    for token in range(1, 4):
        play_token(rig, ids, token)
    assert (field(rig, "cold") == 0).all()
    assert (field(rig, "read_s") == 0).all()


def test_the_sum_does_not_depend_on_the_order_of_reads():
    sums = []
    for seed in range(3):
        rig = Rig(Spec(layers=1, n_experts=20, slots=0, reserve=0, rows=12, spare=4))
        rig.delay_reads(seed)
        cold = np.flatnonzero(rig.ram_rows.numpy() < 0)[:4].astype(np.int32)[None]
        play_token(rig, cold, 7)
        assert field(rig, "cold") == 4
        sums.append(rig.box.cpu_sums.clone())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_read_that_fails_ends_the_token(after):
    """All flags are raised, the key has no row, and the next token is right."""
    rig, generator = Rig(COLD), np.random.default_rng(after)
    rig.reader.inject(rig.file.name, "error", EIO, after, 1)

    def tokens():
        for token in range(20):
            rig.host.clear_flags()
            gpu = Gpu(rig, token, random_ids(COLD, generator))
            gpu.start()
            try:
                rig.host.serve_token()
            finally:
                gpu.join(60)
                assert not gpu.is_alive()

    with pytest.raises(ReadFailure, match="Input/output error"):
        tokens()
    assert rig.all_raised()
    assert rig.cold.failed >= 0
    assert rig.ram_rows[rig.cold.failed] < 0
    rig.check_places()
    for token in range(5):
        play_token(rig, random_ids(COLD, generator), token)
    rig.host.wait_for_copies()
    rig.check_places()


def test_sizes_that_do_not_fit_are_named():
    rig = Rig(COLD)
    with pytest.raises(ValueError, match=r"extents: of 0 experts given, of n_keys=30 needed"):
        ColdReader(rig.rows, rig.reader, [])
    rig.cold = ColdReader(rig.rows, rig.reader, [([(0, 0, 5)], None)] * 30)
    with pytest.raises(ValueError, match=r"extents\[0\]: 5 bytes given, an expert's 3456 needed"):
        rig.make_host()
    rig = Rig(COLD)
    rig.rows = None
    with pytest.raises(ValueError, match="only where experts are in RAM or on the GPU"):
        rig.make_host()


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "rows"), PLACES)
@pytest.mark.parametrize("seed", [1, 2])
def test_prompts_have_the_same_answers(oracle, tmp_path, slots, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    tiers = build_cold(StandInDevice(seed, max_delay_us=100), tmp_path / "experts", slots, rows)
    for n_tokens in (1, 90, 2, 40):
        for layer in range(FIRST, FIRST + LAYERS):
            chunk = random_chunk(n_tokens, generator, skew=seed)
            assert relative_error(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk)) < 5e-3
        check_places(tiers)
    records = tiers.prefill.records
    assert sum(record.cold for record in records) > 0
    assert all(
        record.residents + record.uploads + record.cpu <= EXPERTS
        and (record.cold == 0) == (record.read_s == 0)
        for record in records
    )


@pytest.mark.parametrize(("slots", "rows"), PLACES)
@pytest.mark.parametrize("faster", ["cpu_gbps", "pcie_gbps"])
def test_no_races(tmp_path, monkeypatch, slots, rows, faster):
    races = Races()
    tiers = build_cold(RecordingDevice(races), tmp_path / "experts", slots, rows)
    races.steps.clear()
    watch_cpu(races, tiers, monkeypatch)
    watch_reads(races, tiers.cold.store, monkeypatch)
    tiers.prefill.costs.pcie_gbps = tiers.prefill.costs.cpu_gbps = 1.0
    setattr(tiers.prefill.costs, faster, 4.0)
    generator = torch.Generator().manual_seed(6)
    for n_tokens, layer in itertools.product((30, 20), range(FIRST, FIRST + LAYERS)):
        tiers.forward(layer, *random_chunk(n_tokens, generator, skew=2))
    tiers.synchronize()
    assert races.find() == []
    assert sum(record.cold for record in tiers.prefill.records) > 8


def watch_reads(races, store, monkeypatch):
    """Record reads as steps of the host, which must know that the row is free when it begins a read."""
    submit = store.submit

    def recorded(key, row, *, prefetch=False):
        races.step("host", [], [torch.from_numpy(row)])
        return submit(key, row, prefetch=prefetch)

    monkeypatch.setattr(store, "submit", recorded)


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "rows"), PLACES)
@pytest.mark.parametrize("seed", [3, 4])
def test_prompts_and_tokens_take_turns(oracle, tmp_path, slots, rows, seed):
    tiers = build_cold(StandInDevice(seed, max_delay_us=50), tmp_path / "experts", slots, rows)
    generator, numbers = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    tiers.cold.store.reader.inject(str(tmp_path), "delay", 300)
    for _ in range(6):
        n_tokens, layers = (
            int(numbers.integers(1, 60)),
            int(numbers.integers(0, LAYERS + 1)),
        )  # some prompts end early
        for layer in range(FIRST, FIRST + layers):
            chunk = random_chunk(n_tokens, generator)
            assert relative_error(tiers.forward(layer, *chunk), oracle.forward(layer, *chunk)) < 5e-3
        for _ in range(int(numbers.integers(0, 4))):
            ids, weights, hidden = random_chunk(LAYERS, generator)
            out = decode(tiers, ids, weights, hidden)
            for layer in range(LAYERS):
                row = slice(layer, layer + 1)
                expected = oracle.forward(FIRST + layer, ids[row], weights[row], hidden[row])[0]
                assert relative_error(out[layer], expected) < 5e-3
        if numbers.random() < 0.5:
            check_places(tiers)
    check_places(tiers)


def test_a_prompt_keeps_what_it_used_most(tmp_path):
    tiers = build_cold(StandInDevice(max_delay_us=0), tmp_path / "experts", 0, 24)
    cold = np.flatnonzero(tiers.ram.rows[:EXPERTS] < 0)[:TOP_K]
    _, *rest = random_chunk(40, torch.Generator().manual_seed(3))
    for layer in range(LAYERS):
        tiers.forward(FIRST + layer, torch.from_numpy(cold).expand(40, TOP_K).contiguous(), *rest)
    check_places(tiers)
    assert (tiers.ram.rows[cold] >= 0).all()
    assert (tiers.ram.rows[EXPERTS + cold] >= 0).all()


def test_layers_to_come_lose_no_rows(tmp_path):
    """A prompt that uses all experts reads them through RAM, and each layer keeps its number of rows."""
    tiers = build_cold(StandInDevice(max_delay_us=0), tmp_path / "experts", 0, 36)
    before = [(rows >= 0).sum() for rows in np.split(tiers.ram.rows, LAYERS)]
    every = (torch.arange(EXPERTS)[:, None] + torch.arange(TOP_K)) % EXPERTS
    _, *rest = random_chunk(EXPERTS, torch.Generator().manual_seed(4))
    for _ in range(2):
        for layer in range(FIRST, FIRST + LAYERS):
            tiers.forward(layer, every, *rest)
        check_places(tiers)
        assert [(rows >= 0).sum() for rows in np.split(tiers.ram.rows, LAYERS)] == before
    cold = [record.cold for record in tiers.prefill.records]
    assert cold == [EXPERTS - n for n in before] * 2


@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_prompt_whose_read_fails(oracle, tmp_path, after):
    tiers = build_cold(StandInDevice(max_delay_us=50), tmp_path / "experts", 12, 20)
    tiers.cold.store.reader.inject(str(tmp_path), "error", EIO, after, 1)
    chunk = random_chunk(80, torch.Generator().manual_seed(9))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.\d+.*Input/output error"):
        for _ in range(9):
            tiers.forward(FIRST, *chunk)
    check_places(tiers)
    assert relative_error(tiers.forward(FIRST, *chunk), oracle.forward(FIRST, *chunk)) < 5e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_an_interrupt_leaves_rows_whole(oracle, tmp_path, monkeypatch, steps):
    tiers = build_cold(StandInDevice(max_delay_us=50), tmp_path / "experts", 12, 20)
    chunk = random_chunk(80, torch.Generator().manual_seed(10))
    calls = itertools.count(1)
    wait = tiers.cold.store.wait

    def interrupt(ticket):
        if next(calls) == steps:
            raise KeyboardInterrupt
        wait(ticket)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tiers.cold.store, "wait", interrupt)
        tiers.forward(FIRST, *chunk)
    check_places(tiers)
    assert relative_error(tiers.forward(FIRST, *chunk), oracle.forward(FIRST, *chunk)) < 5e-3


def test_too_few_rows(tmp_path):
    with pytest.raises(PlanError, match=r"RAM holds 11 experts; to read others from disk, 12 are needed"):
        build_cold(StandInDevice(), tmp_path / "experts", 4, 11)
