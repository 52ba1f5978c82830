"""The GPU's slab: it shrinks if memory is short, and holds the experts that its table says."""

import logging

import pytest
import torch

from helpers.offload.tiers import EXPERTS, LAYERS, TOP_K, all_bytes, small_config
from moebox.errors import PlanError
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.memory.gpu_slab import RING_SLOTS, GpuSlab, spread_keys
from moebox.offload.memory.ram_slab import RamSlab, row_stride


def test_as_planned(caplog):
    with caplog.at_level(logging.WARNING, "moebox"):
        gpu = GpuSlab(small_config(), StandInDevice(), 30)
    assert gpu.slab.shape == (30 + RING_SLOTS, gpu.stride)
    assert (gpu.n_slots, gpu.n_cached) == (30, 30 - TOP_K)
    assert not caplog.records


@pytest.mark.parametrize(("slots", "reserve"), [(0, 0), (1, 0), (4, 2), (8, 4), (9, 4)])
def test_reserve_leaves_room_for_residents(slots, reserve):
    gpu = GpuSlab(small_config(), StandInDevice(), slots)
    assert (gpu.residency.reserve, gpu.n_cached) == (reserve, slots - reserve)


def test_shrinks_and_says_so_once(caplog):
    stride = row_stride(small_config())
    with caplog.at_level(logging.WARNING, "moebox"):
        gpu = GpuSlab(small_config(), StandInDevice(vram_bytes=stride * (RING_SLOTS + 75)), 100)
    assert gpu.n_slots == 72  # 100, 90, 81, 72
    assert gpu.residency.n_slots == 72
    (record,) = caplog.records
    assert "72 experts, not for the planned 100" in record.message


def test_shrinks_to_nothing_but_the_ring():
    stride = row_stride(small_config())
    assert GpuSlab(small_config(), StandInDevice(vram_bytes=stride * RING_SLOTS), 50).n_slots == 0
    with pytest.raises(PlanError, match="no GPU memory"):
        GpuSlab(small_config(), StandInDevice(vram_bytes=stride * RING_SLOTS - 1), 50)


def test_fill_and_clear():
    config, device = small_config(), StandInDevice()
    ram, gpu = RamSlab(config, device=device), GpuSlab(config, device, 12)
    ram.fill_synthetic()
    gpu.fill(ram, [5, 40, 0])
    for key in (5, 40, 0):
        slot = gpu.residency.slot(key)
        assert torch.equal(gpu.slab[slot, : config.expert_bytes], all_bytes(config)[key])
    assert gpu.measure_gbps(ram) > 0
    gpu.clear()
    assert gpu.residency.n_free == 12


def test_ring_comes_behind_the_cache():
    gpu = GpuSlab(small_config(), StandInDevice(), 3)
    places = [gpu.ring_slot(place) for place in range(2 * RING_SLOTS)]
    assert places == [*range(3, 3 + RING_SLOTS)] * 2


def test_keys_are_spread_over_the_layers():
    keys = spread_keys(LAYERS, EXPERTS)
    assert sorted(keys) == list(range(LAYERS * EXPERTS))
    assert keys[:4] == [0, EXPERTS, 1, EXPERTS + 1]
