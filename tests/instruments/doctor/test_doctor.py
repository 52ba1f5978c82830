"""`moebox doctor`: its checks, what it keeps in the profile, its output and exit code."""

import json
import re
import shutil
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from helpers.convert import make_source
from helpers.paths import ROOT
from moebox.cli import main_group
from moebox.instruments.doctor import doctor
from moebox.instruments.doctor.checks.base import Check
from moebox.instruments.doctor.doctor import DoctorOptions, DoctorReport, examine
from moebox.instruments.doctor.text import render_doctor
from moebox.instruments.measure import ceilings
from moebox.offload.machine import drive_speed
from moebox.offload.machine.drive_speed import DriveSpeed
from moebox.offload.machine.drives import Drive
from moebox.offload.machine.hardware import cpu_identity
from moebox.offload.machine.profile import MachineProfile
from moebox.quantize.convert import quantize


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short measurements, on a machine that seems idle, and a profile of the test's own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "REPEATS", 1)
    monkeypatch.setattr(ceilings, "CPU_TOKENS", 2)
    monkeypatch.setattr(drive_speed, "LEAST_BYTES", 1)
    monkeypatch.setattr(drive_speed, "DEPTH_S", 0.01)
    monkeypatch.setattr(doctor, "busy_cpus", lambda: 0.0)


@pytest.fixture
def model(tmp_path):
    make_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "model")
    return tmp_path / "model"


def by_id(report):
    return {check.id: check for check in report.checks}


def test_a_machine_without_a_model():
    told = []
    report = examine(DoctorOptions(), told.append)
    checks = by_id(report)
    assert checks["model.files"].status == "skip"
    assert checks["drive.bandwidth"].status == "skip"
    assert checks["ram.bandwidth"].figures["ram_gbps"] > 0
    assert told
    assert not report.failed
    kept = MachineProfile.load().find("cpu", cpu_identity())
    assert kept.figures == checks["ram.bandwidth"].figures


def test_a_models_drive_is_measured_and_kept(model):
    report = examine(DoctorOptions(model))
    checks = by_id(report)
    assert checks["model.files"].status == "pass"
    assert checks["drive.bandwidth"].figures["gbps"] > 0
    drive = doctor.drive_at(model).identity
    profile = MachineProfile.load()
    assert profile.find("drive", drive).figures == checks["drive.bandwidth"].figures
    assert profile.drive_depth(drive) == checks["drive.bandwidth"].figures["depth"]
    assert profile.ceilings(drives=[drive]).nvme_gbps == checks["drive.bandwidth"].figures["gbps"]


def test_copies_on_several_drives_are_each_measured(model, tmp_path, monkeypatch):
    store = tmp_path / "store"
    store.mkdir()
    for shard in model.glob("*.safetensors"):
        shutil.copy(shard, store)

    def by_folder(path, **roots):
        return Drive("nvme1n1" if store in path.parents else "nvme0n1", f"identity of {path.parent.name}")

    monkeypatch.setattr(doctor, "drive_at", by_folder)
    checks = examine(DoctorOptions(model, [store])).checks
    assert [c.subject for c in checks if c.id == "drive.bandwidth"] == ["nvme0n1", "nvme1n1"]
    profile = MachineProfile.load()
    both = profile.ceilings(drives=["identity of model", "identity of store"])
    assert both.nvme_gbps > profile.ceilings(drives=["identity of model"]).nvme_gbps > 0


def test_reads_through_the_page_cache_are_not_kept(model, monkeypatch):
    monkeypatch.setattr(doctor, "measure_drive", lambda *_: DriveSpeed({1: 90.0}, direct=False))
    report = examine(DoctorOptions(model))
    assert by_id(report)["drive.bandwidth"].status == "warn"
    assert MachineProfile.load().find("drive", doctor.drive_at(model).identity) is None


def test_the_manual_explains_every_check(model):
    """The id of a check that only an NVMe drive brings up is listed by hand."""
    text = (ROOT / "docs/doctor.md").read_text()
    explained = set(re.findall(r"^\| `([a-z.-]+)` \|", text, re.MULTILINE))
    assert {check.id for check in examine(DoctorOptions(model)).checks} | {"drive.link"} == explained


def test_figures_of_a_busy_machine_do_not_replace_better_ones(monkeypatch):
    monkeypatch.setattr(doctor, "busy_cpus", lambda: 1000.0)
    known = MachineProfile()
    known.put("cpu", cpu_identity(), {"ram_gbps": 1e6, "cpu_tflops": 1e6})
    known.save()
    report = examine(DoctorOptions())
    assert by_id(report)["cpu.load"].status == "warn"
    assert MachineProfile.load().find("cpu", cpu_identity()).figures["ram_gbps"] == 1e6
    assert "not replaced" in by_id(report)["profile"].seen


def test_a_busy_machine_without_a_profile_gets_one(monkeypatch):
    monkeypatch.setattr(doctor, "busy_cpus", lambda: 1000.0)
    report = examine(DoctorOptions())
    assert MachineProfile.load().find("cpu", cpu_identity())
    assert "not replaced" not in by_id(report)["profile"].seen


def test_a_profile_that_cannot_be_kept_is_a_warning(tmp_path):
    (tmp_path / "data").write_text("a file in the way")
    report = examine(DoctorOptions())
    assert by_id(report)["profile"].status == "warn"
    assert not report.failed


def test_the_command_prints_json_and_fails_with_a_damaged_model(model):
    shard = sorted(model.glob("*.safetensors"))[0]
    whole = CliRunner().invoke(main_group, ["doctor", str(model), "--json"])
    shard.write_bytes(shard.read_bytes()[:-1])
    damaged = CliRunner().invoke(main_group, ["doctor", str(model), "--json"], standalone_mode=False)
    data = json.loads(damaged.stdout)
    assert damaged.return_value == 1
    assert data["failed"]
    failed = [check for check in data["checks"] if check["status"] == "fail"]
    assert [check["id"] for check in failed] == ["model.files"]
    assert shard.name in failed[0]["seen"]
    # The whole model fails only in its tokenizer, which is a stub.
    assert [c["id"] for c in json.loads(whole.stdout)["checks"] if c["status"] == "fail"] == [
        "model.tokenizer"
    ]


def test_the_report_as_text():
    report = DoctorReport(
        [
            Check("cpu.isa", "pass", "avx512"),
            Check("drive.bandwidth", "warn", "0.5 GB/s [sic]", "It is slow.", "Use another.", "nvme0n1"),
            Check("model.files", "fail", "a truncated shard", "It does not load.", "Fetch it again."),
            Check("gpu.device", "skip", "no GPU"),
        ]
    )
    out = StringIO()
    render_doctor(report, Console(file=out, width=100))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert any(line.startswith("FAIL") and "a truncated shard" in line for line in lines)
    assert "costs: It is slow." in lines
    assert "do: Fetch it again." in lines
    assert any("nvme0n1: 0.5 GB/s [sic]" in line for line in lines)
    assert lines[-1] == "1 passed, 1 with a warning, 1 failed, 1 skipped"
