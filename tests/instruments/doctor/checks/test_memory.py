"""Checks of memory: this machine's, and made-up ones."""

import resource

import pytest

from moebox.instruments.doctor.checks import memory
from moebox.instruments.doctor.checks.base import Roots
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.machine.hardware import CgroupLimit
from moebox.offload.machine.profile import Part

GIB = 1 << 30
TINY, K2 = shape_config("tiny"), shape_config("kimi-k2")


def test_this_machine():
    assert memory.size().figures["available_bytes"] > 0
    assert memory.limits().status in ("pass", "warn")
    assert memory.huge_pages(Roots()).seen
    assert memory.locked(has_gpu=False).status == "skip"


def test_a_model_that_fits_and_one_that_does_not():
    fits = memory.size(TINY, total=64 * GIB, available=32 * GIB)
    assert fits.status == "pass"
    small = memory.size(K2, total=512 * GIB, available=300 * GIB)
    assert small.status == "warn"
    assert "49% fit memory" in small.seen  # less the system's share and the backbone
    assert "moebox plan" in small.fix


def test_memory_of_a_gpu_counts_for_backbone_and_experts():
    with_gpu = memory.size(K2, total=512 * GIB, available=300 * GIB, vram=80 * GIB)
    assert with_gpu.status == "warn"
    assert "64% fit memory and the GPU" in with_gpu.seen
    assert memory.size(K2, total=512 * GIB, available=500 * GIB, vram=100 * GIB).status == "pass"
    assert memory.size(K2, total=512 * GIB, available=500 * GIB).status == "warn"


def test_the_tightest_limit_is_named(tmp_path):
    limits = [
        CgroupLimit(tmp_path / "memory.max", 32 * GIB, 1 * GIB),
        CgroupLimit(tmp_path / "job/memory.max", 8 * GIB, 2 * GIB),
        CgroupLimit(tmp_path / "memory.limit_in_bytes", 1 << 62, 0),
    ]
    check = memory.limits(64 * GIB, limits)
    assert check.status == "warn"
    assert str(tmp_path / "job/memory.max") in check.seen
    assert check.figures == {"limit_bytes": 8 * GIB, "headroom_bytes": 6 * GIB}
    assert memory.limits(64 * GIB, limits[2:]).status == "pass"


def figures(gbps):
    return {"ram_gbps": gbps, "cpu_tflops": 0.3}


def test_bandwidth_is_compared_with_the_earlier_one():
    before = Part("cpu", "c", "2026-01-31T10:00:00Z", figures(100.0))
    assert memory.bandwidth(figures(90.0), 16, before).status == "pass"
    assert memory.bandwidth(figures(110.0), 16).status == "pass"
    slower = memory.bandwidth(figures(50.0), 16, before)
    assert slower.status == "warn"
    assert "on 2026-01-31 it was 100.0 GB/s" in slower.seen
    assert "2.0 times as long" in slower.costs
    assert slower.figures == figures(50.0)


def test_an_implausible_bandwidth_is_a_warning():
    check = memory.bandwidth(figures(4.0), 2)
    assert check.status == "warn"
    assert "3.0 s" in check.costs


def test_a_failed_measurement_is_a_warning():
    check = memory.bandwidth(OSError("no memory"), 2)
    assert check.status == "warn"
    assert "no memory" in check.seen


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("always [madvise] never\n", "pass"),
        ("[always] madvise never", "pass"),
        ("always madvise [never]", "warn"),
    ],
)
def test_huge_pages(tmp_path, text, status):
    file = tmp_path / "kernel/mm/transparent_hugepage/enabled"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert memory.huge_pages(Roots(sys=tmp_path)).status == status


def test_a_kernel_without_huge_pages(tmp_path):
    check = memory.huge_pages(Roots(sys=tmp_path))
    assert check.status == "warn"
    assert "CONFIG_TRANSPARENT_HUGEPAGE" in check.fix


def test_locked_memory_matters_with_a_gpu_only():
    assert memory.locked(has_gpu=False, need=8 * GIB, limit=GIB).status == "skip"
    assert memory.locked(has_gpu=True, need=8 * GIB, limit=16 * GIB).status == "pass"
    assert memory.locked(has_gpu=True, need=8 * GIB, limit=resource.RLIM_INFINITY).status == "pass"
    low = memory.locked(has_gpu=True, need=8 * GIB, limit=8 << 20)
    assert low.status == "warn"
    assert "8.0 MiB" in low.seen
    assert "ulimit -l" in low.fix
