"""The drive of a file: on this machine, and in made-up trees of other machines."""

import os
from pathlib import Path

import pytest

from moebox.offload.machine.drives import drive_at


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path):
    """A tree like /sys and a mount table in which `tmp_path` lies on the drive that a test puts there."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, root):
        number = root.stat().st_dev
        self.root = root
        self.device = f"{os.major(number)}:{os.minor(number)}"
        self.sys, self.mountinfo = root / "sys", root / "mountinfo"

    def mount(self, filesystem, source):
        self.mountinfo.write_text(
            "22 1 0:21 / /proc rw - proc proc rw\n"
            f"30 1 {self.device} /sub /my\\040models rw,noatime shared:1 - {filesystem} {source} rw\n"
        )

    def block(self, where, number=None, **files):
        folder = self.sys / "devices" / where
        folder.mkdir(parents=True)
        for name, text in files.items():
            write(folder / name.replace("__", "/"), text)
        if number:
            link = self.sys / "dev/block" / number
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
        return folder

    def drive(self):
        return drive_at(self.root, self.sys, self.mountinfo)


def test_this_machine():
    drive = drive_at(Path(__file__))
    assert drive.name
    assert drive.identity
    assert drive_at(Path(__file__).parent / "not" / "there") == drive


def test_a_partition_is_its_whole_drive(machine):
    machine.mount("ext4", "/dev/nvme0n1p2")
    machine.block(
        "pci/nvme/nvme0/nvme0n1",
        size=7501476528,
        device__model="Samsung SSD 990 PRO 4TB  ",
        device__serial="S7KGNJ0W \0",
        queue__rotational=0,
    )
    machine.block("pci/nvme/nvme0/nvme0n1/nvme0n1p2", machine.device, partition=2, size=1000)
    drive = machine.drive()
    assert drive.name == "nvme0n1"
    assert drive.identity == "Samsung SSD 990 PRO 4TB S7KGNJ0W 3841 GB"
    assert drive.nbytes == 7501476528 * 512
    assert (drive.filesystem, drive.rotational, drive.members) == ("ext4", False, ())


def test_a_raid_names_its_members(machine):
    machine.mount("xfs", "/dev/md0")
    folder = machine.block("virtual/block/md0", machine.device, size=100)
    (folder / "slaves").mkdir()
    for member in ("nvme1n1/nvme1n1p1", "nvme0n1/nvme0n1p1"):
        part = machine.block(f"pci/{member}", partition=1)
        (folder / "slaves" / part.name).symlink_to(part)
    assert machine.drive().members == ("nvme0n1", "nvme1n1")


def test_a_logical_volume_is_identified_by_its_name_and_uuid(machine):
    machine.block(
        "virtual/block/dm-0", machine.device, size=2 * 10**9, dm__name="vg0-models", dm__uuid="LVM-x"
    )
    assert machine.drive().identity == "vg0-models LVM-x 1024 GB"


def test_a_spinning_disk(machine):
    machine.block("pci/ata/sda", machine.device, size=100, device__model="WD40", queue__rotational=1)
    assert machine.drive().rotational


def test_a_file_system_with_a_number_of_its_own_is_found_by_its_source(machine):
    # btrfs mounts under a number that no drive has; /dev/null replaces the drive's device file.
    machine.mount("btrfs", "/dev/null")
    machine.block("pci/nvme1n1", "1:3", size=2000, device__model="Fast")
    drive = machine.drive()
    assert (drive.name, drive.filesystem) == ("nvme1n1", "btrfs")


@pytest.mark.parametrize(
    ("filesystem", "source"), [("nfs4", "server:/models"), ("overlay", "overlay"), ("tmpfs", "tmpfs")]
)
def test_without_a_drive_the_file_system_is_named(machine, filesystem, source):
    machine.mount(filesystem, source)
    drive = machine.drive()
    assert (drive.name, drive.identity, drive.nbytes) == (filesystem, f"{filesystem} {source}", 0)


def test_a_subvolume_is_found_by_its_mount_point(machine):
    machine.mountinfo.write_text(
        "29 1 0:5 / / rw - ext4 /dev/sda1 rw\n"
        f"30 29 0:999 / {str(machine.root).replace(' ', chr(92) + '040')} rw - btrfs /dev/null rw\n"
    )
    machine.block("pci/nvme1n1", "1:3", size=2000, device__model="Fast")
    drive = machine.drive()
    assert (drive.name, drive.filesystem) == ("nvme1n1", "btrfs")


def test_without_a_mount_table_the_number_is_named(machine):
    assert machine.drive().identity == f"device {machine.device}"
