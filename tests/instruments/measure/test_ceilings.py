"""Ceilings of the box: with and without a GPU every figure is measured."""

import pytest

from moebox.instruments.measure import ceilings
from moebox.instruments.measure.random_model import shape_config
from moebox.kernels.cpu import ThreadPool
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.machine.floor import Ceilings

CONFIG = shape_config("tiny")


@pytest.fixture(autouse=True)
def little(monkeypatch):
    for name, value in {"READ_BYTES": 1 << 20, "HBM_BYTES": 1 << 20, "BESIDE_S": 1e-4, "REPEATS": 1}.items():
        monkeypatch.setattr(ceilings, name, value)


def test_cpu_and_gpu_together_are_all_ceilings_but_the_drive():
    pool = ThreadPool()
    cpu = ceilings.cpu_figures(CONFIG, pool)
    gpu = ceilings.gpu_figures(CONFIG, pool, StandInDevice())
    assert set(cpu) | set(gpu) == set(Ceilings(1).to_dict()) - {"nvme_gbps"}
    assert not set(cpu) & set(gpu)
    assert all(figure > 0 for figure in [*cpu.values(), *gpu.values()])


def test_without_a_gpu_its_figures_are_0():
    found = ceilings.measure_ceilings(CONFIG, ThreadPool())
    assert found.ram_gbps > 0
    assert (found.has_gpu, found.pcie_gbps, found.pcie_down_gbps) == (False, 0.0, 0.0)
