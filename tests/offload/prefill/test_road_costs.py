"""The costs of the roads are learned, and the split is the best one."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebox.kernels import cpu
from moebox.offload.machine.hardware import cpu_identity
from moebox.offload.machine.profile import MachineProfile
from moebox.offload.prefill.road_costs import RoadCosts, cpu_share, first_costs, two_roads_s

COUNTS = st.lists(st.integers(1, 200), min_size=1, max_size=7).map(lambda counts: np.array(counts, np.int64))


def k2(**changes):
    return RoadCosts(24_772_608, 6.0 * 7168 * 2048, **{"pcie_gbps": 54.0, "cpu_gbps": 45.0} | changes)


@given(COUNTS)
def test_floor_is_the_best_of_all_splits(counts):
    costs = k2()
    cpu_s = costs.cpu_s(counts)
    best = min(
        max(cpu_s[list(on_cpu)].sum(), costs.upload_s * (len(counts) - sum(on_cpu)))
        for on_cpu in map(np.array, product([False, True], repeat=len(counts)))
    )
    assert two_roads_s(costs, counts) == pytest.approx(best)


@given(COUNTS, st.floats(0, 0.01))
def test_the_cpu_ends_in_time_and_one_more_would_not(counts, ahead_s):
    costs, counts = k2(), np.sort(counts)[::-1]
    n = cpu_share(costs, counts, ahead_s, 0.0, batch_s=10.0)
    cpu_s = np.cumsum(costs.cpu_s(counts[::-1]))
    assert n == 0 or cpu_s[n - 1] <= ahead_s + costs.upload_s * (len(counts) - n)
    assert n == len(counts) or cpu_s[n] > ahead_s + costs.upload_s * (len(counts) - n - 1)


def test_batches_are_short_and_the_last_is_whole():
    counts = np.full(100, 5, np.int64)
    n = cpu_share(k2(), counts, 0.0, 0.0, batch_s=5e-3)
    assert k2().cpu_s(counts[:n]).sum() <= 5e-3 < k2().cpu_s(counts[: n + 1]).sum()
    assert cpu_share(k2(), counts[:30], 0.0, 0.0, batch_s=5e-3) == 13  # 7.2 ms; 17 uploads take 7.8


def test_few_tokens_cost_bytes_and_many_arithmetic():
    costs = k2(cpu_gflops=3600.0)
    one, eleven, many = costs.cpu_s(np.array([1, 11, 85]))
    assert one == eleven == pytest.approx(24_772_608 / 45e9)
    assert many == pytest.approx(85 * 6 * 7168 * 2048 / 3.6e12)


def test_learns_what_decided():
    costs, truth = k2(), k2(pcie_gbps=30.0, cpu_gbps=20.0, cpu_gflops=900.0)
    for _ in range(30):
        costs.learn_upload(truth.upload_s)
        for counts in (np.array([1, 2, 3]), np.array([150, 200])):
            costs.learn_cpu(counts, float(truth.cpu_s(counts).sum()))
    for name in ("pcie_gbps", "cpu_gbps", "cpu_gflops"):
        assert getattr(costs, name) == pytest.approx(getattr(truth, name), rel=1e-3)


def test_one_outlier_does_not_decide():
    costs = k2()
    costs.learn_cpu(np.array([1, 1]), 10.0)
    assert costs.cpu_gbps >= 45.0 / 2
    assert costs.cpu_gflops == pytest.approx(2000.0)


def test_first_costs_are_the_machines_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    threads = cpu.allowed_cpus()
    guessed = first_costs(100, 6.0, threads, "a GPU")
    profile = MachineProfile()
    profile.put("cpu", cpu_identity(), {"ram_gbps": 132.0, "cpu_tflops": 5.4})
    profile.save()
    without_gpu = first_costs(100, 6.0, threads, "a GPU")
    profile.put("gpu", "a GPU", {"pcie_gbps": 55.0, "pcie_beside_gbps": 48.0, "ram_beside_gbps": 90.0})
    profile.save()
    measured = first_costs(100, 6.0, threads, "a GPU")
    other = first_costs(100, 6.0, threads, "another GPU")

    assert (guessed.cpu_gbps, guessed.cpu_gflops) == (4.0 * threads, 200.0 * threads)
    assert (without_gpu.cpu_gbps, without_gpu.pcie_gbps) == (132.0, guessed.pcie_gbps)
    assert (measured.pcie_gbps, measured.cpu_gbps) == (48.0, 90.0)
    assert measured.cpu_gflops == pytest.approx(5400)
    assert other == without_gpu
    if threads > 1:
        assert first_costs(100, 6.0, 1, "a GPU").cpu_gflops == pytest.approx(5400 / threads)
