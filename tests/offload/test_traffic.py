"""Hits by tier and bytes by road, compared with counts that were taken by other means."""

import numpy as np
import pytest
import torch

from helpers.offload.store import cpu_experts
from helpers.offload.tiers import (
    EXPERTS,
    FIRST,
    LAYERS,
    TOP_K,
    Races,
    RecordingDevice,
    build,
    build_cold,
    decode,
    random_chunk,
    small_config,
)
from helpers.runtime import make_checkpoint
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.traffic import Traffic

NBYTES = small_config().expert_bytes


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_totals_add_and_subtract():
    before, after = Traffic(1, 2, 3, 4, 5, 6), Traffic(10, 20, 30, 40, 50, 60)
    assert after - before == Traffic(9, 18, 27, 36, 45, 54)
    assert (after - before) + before == after
    assert after.hits == 60


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_the_cpu_with_and_without_a_drive(tmp_path, share):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    config, generator = checkpoint.config, torch.Generator().manual_seed(1)
    n_keys, top_k = config.n_keys, config.num_experts_per_tok
    experts = cpu_experts(checkpoint, max(2 * top_k, int(share * n_keys)))
    loaded = experts.traffic()
    assert loaded.hits == 0
    ram_hits = disk_hits = 0
    for count in (5, 1, 40, 1, 1):
        for moe, layer in enumerate(config.moe_layers):
            ids = torch.rand(count, config.n_routed_experts, generator=generator).topk(top_k).indices
            used = [moe * config.n_routed_experts + int(expert) for expert in ids.unique()]
            there = sum(experts.cache.in_ram(key) for key in used)
            if count == 1:
                ram_hits, disk_hits = ram_hits + there, disk_hits + len(used) - there
            before = experts.traffic()
            hidden = torch.randn(count, config.hidden_size, generator=generator)
            experts.forward(layer, ids, torch.rand(count, top_k), hidden)
            moved = experts.traffic() - before
            assert moved.hits == len(used)
            assert moved.cpu_bytes == len(used) * config.expert_bytes
            assert moved.disk_bytes == moved.disk_hits * config.expert_bytes
            assert count > 1 or (moved.ram_hits, moved.disk_hits) == (there, len(used) - there)
    total = experts.traffic() - loaded
    assert total.gpu_hits == total.pcie_bytes == 0
    assert (total.disk_hits > 0) == (share < 1)
    assert total.ram_hits >= ram_hits > 0
    assert total.disk_hits >= disk_hits


def test_a_layer_that_failed_counts_what_it_used(tmp_path):
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path / "model"))
    config = checkpoint.config
    experts = cpu_experts(checkpoint, 2 * config.num_experts_per_tok)
    for shard in {path for paths in experts.cache.store.drives.values() for path in paths}:
        with shard.open("r+b") as file:
            file.truncate(4096)
    ids = torch.arange(config.n_routed_experts)[-config.num_experts_per_tok :][None]
    with pytest.raises(CheckpointError):
        experts.forward(config.moe_layers[-1], ids, torch.rand(ids.shape), torch.randn(1, config.hidden_size))
    assert experts.traffic().disk_hits == config.num_experts_per_tok


@pytest.mark.parametrize(("slots", "exclusive"), [(0, False), (20, False), (20, True), (50, True)])
def test_prompts_on_a_gpu(slots, exclusive):
    races = Races()
    tiers = build(RecordingDevice(races), slots, exclusive)
    generator = torch.Generator().manual_seed(slots)
    tiers.synchronize()
    races.steps.clear()
    used = resident = 0
    for n_tokens in (60, 3, 9):  # the first prompt uploads ahead
        for layer in range(FIRST, FIRST + LAYERS):
            given = random_chunk(n_tokens, generator)
            keys = (layer - FIRST) * EXPERTS + given[0].unique().numpy()
            tiers.decode_host.wait_for_copies()
            used += len(keys)
            resident += int((tiers.gpu.residency.table()[keys] >= 0).sum())
            tiers.forward(layer, *given)
    tiers.synchronize()
    moved = tiers.traffic()
    uploads = sum(actor == "uploads" for actor, *_ in races.steps)
    assert (moved.gpu_hits, moved.ram_hits, moved.disk_hits) == (resident, used - resident, 0)
    assert moved.pcie_bytes == uploads * NBYTES > 0
    wasted = sum(record.wasted for record in tiers.prefill.records)
    assert moved.cpu_bytes + moved.pcie_bytes >= (moved.ram_hits + wasted) * NBYTES
    assert moved.disk_bytes == 0


def test_tokens_on_a_gpu():
    tiers = build(StandInDevice(3, max_delay_us=0), LAYERS * EXPERTS + TOP_K)
    for key in range(0, LAYERS * EXPERTS, 2):
        tiers.gpu.residency.release(key)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        given = random_chunk(LAYERS, generator)
        keys = (given[0] + torch.arange(LAYERS)[:, None] * EXPERTS).flatten().numpy()
        table, before = tiers.gpu.residency.table(), tiers.traffic()
        decode(tiers, *given)
        tiers.synchronize()
        moved = tiers.traffic() - before
        missing = int((table[keys] < 0).sum())
        arrived = int(((table < 0) & (tiers.gpu.residency.table() >= 0)).sum())
        assert (moved.gpu_hits, moved.ram_hits) == (len(keys) - missing, missing)
        assert moved.pcie_bytes == arrived * NBYTES
        assert moved.cpu_bytes == (missing - arrived) * NBYTES
        assert moved.disk_hits == moved.disk_bytes == 0


def test_a_gpu_and_a_drive(tmp_path):
    tiers = build_cold(StandInDevice(5, max_delay_us=0), tmp_path / "experts", slots=12, rows=24)
    generator = torch.Generator().manual_seed(6)
    start = tiers.traffic()
    disk_hits = 0
    for n_tokens in (1, 20, 1, 2, 1):
        if n_tokens == 1:
            given = random_chunk(LAYERS, generator)
            before = tiers.traffic()
            decode(tiers, *given)
            moved = tiers.traffic() - before
            assert moved.hits == LAYERS * TOP_K
            assert moved.cpu_bytes + moved.pcie_bytes == (moved.ram_hits + moved.disk_hits) * NBYTES
            continue
        for layer in range(FIRST, FIRST + LAYERS):
            given = random_chunk(n_tokens, generator)
            keys = (layer - FIRST) * EXPERTS + given[0].unique().numpy()
            tiers.synchronize()
            cold = (tiers.gpu.residency.table()[keys] < 0) & (np.array(tiers.ram.rows)[keys] < 0)
            before = tiers.traffic()
            tiers.forward(layer, *given)
            tiers.synchronize()
            moved = tiers.traffic() - before
            assert (moved.hits, moved.disk_hits) == (len(keys), int(cold.sum()))
            assert moved.disk_bytes == moved.disk_hits * NBYTES
            disk_hits += moved.disk_hits
    assert disk_hits > 0
    total = tiers.traffic() - start
    assert total.disk_bytes == total.disk_hits * NBYTES
