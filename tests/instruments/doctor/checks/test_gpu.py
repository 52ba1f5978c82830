"""Checks of the GPU: made-up ones, and this machine's if it has one."""

import sys
import types

import pytest
import torch

from helpers.offload.gpu import need
from moebox.instruments.doctor.checks import gpu
from moebox.instruments.doctor.checks.base import Roots
from moebox.instruments.doctor.checks.gpu import Gpu, Link

GIB = 1 << 30
H200 = Gpu(0, "NVIDIA H200", 140 * GIB, 139 * GIB, (9, 0), "580.95", (13, 0), Link(5, 16, 5, 16))


def altered(**values):
    return Gpu(**(H200.__dict__ | values))


def card(root, name, vendor, kind):
    folder = root / "sys/bus/pci/devices" / name
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def driver_file(root):
    folder = root / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95\n")


@pytest.fixture
def roots(tmp_path):
    return Roots(tmp_path / "sys", tmp_path / "proc")


@pytest.mark.gpu
def test_this_machine():
    need("cuda")
    found = gpu.find_gpus()
    assert len(found) == torch.cuda.device_count()
    assert found[0].vram_bytes >= found[0].free_bytes > 0
    assert found[0].driver


class NVMLError(Exception):
    pass


def refused(*_):
    raise NVMLError("Not Supported")


def fake_nvml(monkeypatch, **functions):
    """A driver's library of which only `functions` answer."""
    names = (
        "nvmlInit nvmlSystemGetCudaDriverVersion nvmlSystemGetDriverVersion nvmlDeviceGetHandleByUUID "
        "nvmlDeviceGetCurrPcieLinkGeneration nvmlDeviceGetCurrPcieLinkWidth "
        "nvmlDeviceGetMaxPcieLinkGeneration nvmlDeviceGetMaxPcieLinkWidth"
    )
    module = types.SimpleNamespace(NVMLError=NVMLError, **(dict.fromkeys(names.split(), refused) | functions))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    properties = types.SimpleNamespace(name="NVIDIA H200", major=9, minor=0, uuid="1234")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (139 * GIB, 140 * GIB))


def test_driver_and_link_as_far_as_nvml_answers(monkeypatch):
    whole = {
        "nvmlInit": lambda: None,
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlSystemGetDriverVersion": lambda: "580.95",
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
    }
    fake_nvml(monkeypatch, **whole)
    assert gpu.find_gpus() == [H200]
    fake_nvml(monkeypatch, **(whole | {"nvmlDeviceGetMaxPcieLinkWidth": refused}))
    assert gpu.find_gpus() == [altered(link=None)]
    fake_nvml(monkeypatch)
    assert gpu.find_gpus() == [altered(driver="", driver_cuda=None, link=None)]


def test_without_a_gpu_the_check_is_skipped(tmp_path, roots):
    card(tmp_path, "0000:00:02.0", "0x8086", "0x030000")
    card(tmp_path, "0000:01:00.1", gpu.NVIDIA, "0x040300")  # the sound device of a graphics card
    (check,) = gpu.device([], roots)
    assert check.status == "skip"


def test_a_card_without_a_driver(tmp_path, roots):
    card(tmp_path, "0000:01:00.0", gpu.NVIDIA, "0x030200")
    (check,) = gpu.device([], roots, torch_cuda="13.0")
    assert check.status == "warn"
    assert "no driver is loaded" in check.seen


def test_a_driver_but_torch_for_the_cpu(tmp_path, roots):
    card(tmp_path, "0000:01:00.0", gpu.NVIDIA, "0x030000")
    driver_file(tmp_path)
    (check,) = gpu.device([], roots, torch_cuda=None)
    assert check.status == "warn"
    assert "CPU only" in check.seen
    assert "CUDA build" in check.fix


def test_a_driver_but_no_device(tmp_path, roots):
    driver_file(tmp_path)
    (check,) = gpu.device([], roots, torch_cuda="13.0")
    assert check.status == "warn"
    assert "--gpus all" in check.fix
    assert "CUDA 13.0" in check.fix


def test_each_gpu_has_a_check(roots):
    checks = gpu.device([H200, altered(index=1, free_bytes=20 * GIB)], roots)
    assert [check.status for check in checks] == ["pass", "warn"]
    assert [check.subject for check in checks] == ["cuda:0", "cuda:1"]
    assert "140.0 GiB" in checks[0].seen
    assert "20.0 GiB free" in checks[1].seen


def test_an_old_gpu(roots):
    (check,) = gpu.device([altered(capability=(7, 5))], roots)
    assert check.status == "warn"
    assert "compute 7.5" in check.seen


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ([], "skip"),
        ([H200], "pass"),
        ([altered(driver_cuda=(12, 9))], "warn"),
        ([altered(driver="", driver_cuda=None)], "warn"),
    ],
)
def test_drivers(found, status):
    assert gpu.driver(found, torch_cuda="13.0").status == status


def figures(up, down):
    return {"pcie_gbps": up, "pcie_down_gbps": down}


def test_pcie_beside_what_the_link_carries():
    assert gpu.pcie(None, {}).status == "skip"
    assert gpu.pcie(H200, figures(55.0, 53.0)).status == "pass"
    slow = gpu.pcie(H200, figures(55.0, 20.0))
    assert slow.status == "warn"
    assert "PCIe 5 x16 carries 63 GB/s" in slow.seen
    assert slow.figures == figures(55.0, 20.0)
    narrow = gpu.pcie(altered(link=Link(5, 8, 5, 16)), figures(27.0, 26.0))
    assert narrow.status == "warn"
    assert "x8 of x16" in narrow.seen
    assert gpu.pcie(altered(link=None), figures(20.0, 20.0)).status == "pass"


def test_refused_pinning_is_a_warning_with_its_fix():
    check = gpu.pcie(H200, ValueError("pinning failed\nRaise the limit."))
    assert check.status == "warn"
    assert "pinning failed" in check.seen
    assert check.fix == "Raise the limit."
