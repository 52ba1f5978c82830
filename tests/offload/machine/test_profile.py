"""The machine's profile: saved, merged, looked up by part; faults of its file stop nothing."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import version_0_1
from moebox.offload.machine.hardware import cpu_identity
from moebox.offload.machine.profile import MachineProfile, Part, profile_path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "machine.json"


def test_save_and_load_keep_the_profile(path):
    profile = MachineProfile()
    profile.put("cpu", "two cores", {"ram_gbps": 20.5, "cpu_tflops": 0.3})
    profile.put("drive", "disk 1", {"gbps": 6.5, "depth": 4})
    assert profile.save(path)
    again = MachineProfile.load(path)
    assert again.to_dict() == profile.to_dict()
    assert again.find("drive", "disk 1").figures["gbps"] == 6.5
    assert again.drive_depth("disk 1") == 4
    assert again.find("drive", "disk 2") is None
    assert again.drive_depth("disk 2") is None


def test_a_file_of_version_0_1_opens():
    profile = MachineProfile.load(version_0_1.FOLDER / "machine.json")
    drives = ["disk 1"]
    ceilings = profile.ceilings(cpu="two cores, 2 threads", gpu="some GPU 0123", drives=drives)
    assert (ceilings.ram_gbps, ceilings.cpu_tflops) == (20.5, 0.25)
    assert (ceilings.hbm_gbps, ceilings.pcie_gbps, ceilings.nvme_gbps) == (4000.0, 55.0, 6.5)
    assert profile.drive_depth("disk 1") == 4


def test_it_lies_in_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    MachineProfile([Part("gpu", "some GPU", "2026-01-01T00:00:00Z", {"pcie_gbps": 55.0})]).save()
    assert profile_path() == tmp_path / "moebox" / "machine.json"
    assert MachineProfile.load().find("gpu", "some GPU").figures == {"pcie_gbps": 55.0}


def test_a_new_measurement_replaces_the_old_one(path):
    profile = MachineProfile([Part("cpu", "c", "2026-01-01T00:00:00Z", {"ram_gbps": 1.0})])
    profile.put("cpu", "c", {"ram_gbps": 2.0})
    assert profile.save(path)
    assert MachineProfile.load(path).find("cpu", "c").figures == {"ram_gbps": 2.0}


def test_saving_keeps_measurements_of_other_processes(path):
    mine, other = MachineProfile.load(path), MachineProfile.load(path)
    other.put("drive", "disk", {"gbps": 3.0, "depth": 2})
    assert other.save(path)
    mine.put("cpu", "c", {"ram_gbps": 20.0})
    assert mine.save(path)
    both = MachineProfile.load(path)
    assert both.find("drive", "disk")
    assert both.find("cpu", "c")
    assert mine.find("drive", "disk")


def test_of_two_measurements_the_newer_stays(path):
    newer = MachineProfile([Part("cpu", "c", "2026-02-01T00:00:00Z", {"ram_gbps": 2.0})])
    older = MachineProfile([Part("cpu", "c", "2026-01-01T00:00:00Z", {"ram_gbps": 1.0})])
    assert newer.save(path)
    assert older.save(path)
    assert MachineProfile.load(path).find("cpu", "c").figures == {"ram_gbps": 2.0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "parts": []}',
        '{"format": 1}',
        '{"format": 1, "parts": [1]}',
        '{"format": 1, "parts": [{"kind": "cpu"}]}',
        '{"format": 1, "parts": [{"kind": "tape", "identity": "i", "measured": "m", "figures": {}}]}',
        '{"format": 1, "parts": [{"kind": "cpu", "identity": 1, "measured": "m", "figures": {}}]}',
        '{"format": 1, "parts": [{"kind": "cpu", "identity": "i", "measured": "m", "figures": [1]}]}',
        '{"format": 1, "parts": [{"kind": "cpu", "identity": "i", "measured": "m", "figures": {"a": "b"}}]}',
        '{"format": 1, "parts": [{"kind": "cpu", "identity": "i", "measured": "m", "figures": {"a": NaN}}]}',
    ],
)
def test_a_damaged_file_is_logged_and_replaced(path, text, caplog):
    path.parent.mkdir()
    path.write_text(text)
    profile = MachineProfile.load(path)
    assert profile.to_dict()["parts"] == []
    assert str(path) in caplog.text
    profile.put("cpu", "c", {"ram_gbps": 1.0})
    assert profile.save(path)
    assert MachineProfile.load(path).find("cpu", "c")


def test_a_file_that_is_not_text_counts_as_damaged(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert MachineProfile.load(path).to_dict()["parts"] == []


def test_a_file_that_cannot_be_written_is_logged(tmp_path, caplog):
    (tmp_path / "data").write_text("a file where the folder should be")
    profile = MachineProfile()
    profile.put("cpu", "c", {"ram_gbps": 1.0})
    with caplog.at_level(logging.WARNING, "moebox"):
        assert not profile.save(tmp_path / "data" / "machine.json")
    assert "not kept" in caplog.text


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="finite"):
        MachineProfile().put("cpu", "c", {"ram_gbps": float("inf")})


def test_ceilings_are_those_of_this_machine():
    profile = MachineProfile()
    assert profile.ceilings() is None
    profile.put("cpu", cpu_identity(), {"ram_gbps": 20.0, "cpu_tflops": 0.3})
    profile.put("cpu", cpu_identity(1000), {"ram_gbps": 9000.0})
    profile.put("gpu", "g", {"pcie_gbps": 55.0, "pcie_down_gbps": 50.0, "hbm_gbps": 4000.0})
    profile.put("drive", "a", {"gbps": 7.0, "depth": 4})
    profile.put("drive", "b", {"gbps": 6.0, "depth": 2})
    alone = profile.ceilings()
    assert (alone.ram_gbps, alone.cpu_tflops, alone.pcie_gbps, alone.nvme_gbps) == (20.0, 0.3, 0.0, 0.0)
    box = profile.ceilings(gpu="g", drives=["a", "b", "unknown"])
    assert (box.pcie_gbps, box.hbm_gbps, box.nvme_gbps) == (55.0, 4000.0, 13.0)
    assert profile.ceilings(cpu=cpu_identity(1000)).ram_gbps == 9000.0
    assert profile.ceilings(cpu="another machine") is None


WRITER = """
import sys
from pathlib import Path
from moebox.offload.machine.profile import MachineProfile
profile = MachineProfile()
for number in range(100000):
    profile.put("run", f"{sys.argv[2]} {number % 50}", {"number": number})
    assert profile.save(Path(sys.argv[1]))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(path):
    for run in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), f"writer {run}"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline()
        time.sleep(0.02 * run)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        parts = json.loads(path.read_text())["parts"]
        assert {part["identity"].rpartition(" ")[0] for part in parts} == {
            f"writer {n}" for n in range(run + 1)
        }
        assert MachineProfile.load(path).save(path)
