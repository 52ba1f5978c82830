"""Checks of made-up drives."""

import pytest

from moebox.instruments.doctor.checks import drives
from moebox.instruments.doctor.checks.base import Roots
from moebox.offload.machine.drive_speed import DriveSpeed
from moebox.offload.machine.drives import Drive
from moebox.offload.machine.profile import Part

NVME = Drive("nvme0n1", "Fast 4TB S1 4001 GB", "xfs", False, 4001 * 10**9)
SPEED = DriveSpeed({1: 3.0, 2: 5.5, 4: 6.9, 8: 7.0}, direct=True)


@pytest.mark.parametrize(
    ("drive", "status", "words"),
    [
        (NVME, "pass", ""),
        (Drive("md0", "md0 8000 GB", "xfs", members=("nvme0n1", "nvme1n1")), "pass", ""),
        (Drive("sda", "WD40 4001 GB", "ext4", rotational=True), "warn", "tenths of a second"),
        (Drive("vda", "vda 275 GB", "ext4", rotational=True), "pass", ""),
        (Drive("tmpfs", "tmpfs tmpfs", "tmpfs"), "warn", "a second time"),
        (Drive("nfs4", "nfs4 server:/models", "nfs4"), "warn", "another machine"),
        (Drive("fuse.sshfs", "fuse.sshfs box:", "fuse.sshfs"), "warn", "another machine"),
        (Drive("overlay", "overlay overlay", "overlay"), "pass", ""),
    ],
)
def test_kinds(drive, status, words):
    check = drives.kind(drive)
    assert (check.status, check.subject) == (status, drive.name)
    assert words in check.costs
    assert drive.identity in check.seen
    assert all(member in check.seen for member in drive.members)


def pcie(root, name, **files):
    folder = root / "block" / name / "device/device"
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(f"{text}\n")


FULL = {
    "current_link_speed": "16.0 GT/s PCIe", "max_link_speed": "16.0 GT/s PCIe",
    "current_link_width": 4, "max_link_width": 4,
}  # fmt: skip


def test_the_links_of_a_raids_drives(tmp_path):
    pcie(tmp_path, "nvme0n1", **FULL)
    pcie(tmp_path, "nvme1n1", **(FULL | {"current_link_width": 2}))
    raid = Drive("md0", "md0 8000 GB", "xfs", members=("nvme0n1", "nvme1n1"))
    full, narrow = drives.links(raid, Roots(sys=tmp_path))
    assert (full.status, full.subject, full.seen) == ("pass", "nvme0n1", "16.0 GT/s PCIe x4")
    assert (narrow.status, narrow.subject) == ("warn", "nvme1n1")
    assert "x2; the drive can 16.0 GT/s PCIe x4" in narrow.seen


def test_a_drive_without_a_pcie_link(tmp_path):
    assert drives.links(NVME, Roots(sys=tmp_path)) == []


def test_a_fast_drive():
    check = drives.bandwidth(NVME, SPEED)
    assert check.status == "pass"
    assert "7.00 GB/s" in check.seen
    assert "depth 4 suffices" in check.seen
    assert "3.00 at 1, 5.50 at 2" in check.seen
    assert (check.figures["depth"], check.figures["depth_8_gbps"]) == (4, 7.0)


def test_a_slow_drive_is_a_warning_with_the_seconds_of_a_token():
    check = drives.bandwidth(NVME, DriveSpeed({1: 0.5, 2: 0.5}, direct=True))
    assert check.status == "warn"
    assert "23.8 s if none" in check.costs
    assert "2.4 s if one in ten" in check.costs


def test_a_drive_that_was_faster_earlier_is_a_warning():
    before = Part("drive", NVME.identity, "2026-01-31T10:00:00Z", {"gbps": 14.0, "depth": 8})
    check = drives.bandwidth(NVME, SPEED, before)
    assert check.status == "warn"
    assert "On 2026-01-31 it was 14.00 GB/s" in check.costs


def test_reads_through_the_page_cache_are_a_warning():
    check = drives.bandwidth(NVME, DriveSpeed({1: 9.0}, direct=False))
    assert check.status == "warn"
    assert "O_DIRECT" in check.costs


def test_bandwidth_that_was_not_measured():
    assert drives.bandwidth(NVME, None).status == "skip"
    assert drives.not_measured().status == "skip"
    broken = drives.bandwidth(NVME, OSError("a broken shard"))
    assert broken.status == "warn"
    assert "a broken shard" in broken.seen


def test_free_space(tmp_path):
    assert drives.space(tmp_path, "statistics", 10**9).status == "pass"
    full = drives.space(tmp_path, "statistics", 10**6)
    assert full.status == "warn"
    assert full.subject == str(tmp_path)
