"""Finds the drive on which a file lies, and its kind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
MOUNTINFO = Path("/proc/self/mountinfo")
_SECTOR_BYTES = 512
_NO_DRIVE = ("tmpfs", "ramfs", "overlay", "nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre")


@dataclass(frozen=True)
class Drive:
    """A drive, or a file system behind which no drive of this machine is visible.

    Attributes:
        name: the kernel's name, such as "nvme0n1" or "md0"; of a file system its type, such as "nfs4".
        identity: model, serial number and size, as far as the system reports them; the name under which the
            machine's profile keeps the drive's figures.
        filesystem: the file system's type; "" where it is not known.
        rotational: whether it is a spinning disk.
        nbytes: the drive's size; 0 where there is no drive.
        members: the kernel's names of the drives of which it is made (RAID, LVM, encryption).
    """

    name: str
    identity: str
    filesystem: str = ""
    rotational: bool = False
    nbytes: int = 0
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Mount:
    device: str
    point: Path
    filesystem: str
    source: str


def drive_at(path: Path, sys: Path = SYS, mountinfo: Path = MOUNTINFO) -> Drive:
    """The drive behind `path`, or behind its nearest parent that exists.

    The drive of a partition is the whole drive. Behind overlays and network file systems no drive is visible;
    their identity is the mount's type and source.
    """
    path = path.resolve()
    while not path.exists():
        path = path.parent
    number = path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    mount = _mount(device, path, mountinfo)
    folder = _block_folder(device, sys) or _source_folder(mount, sys)
    if folder is None:
        source = f"{mount.filesystem} {mount.source}" if mount else f"device {device}"
        return Drive(mount.filesystem if mount else device, source, mount.filesystem if mount else "")
    return _block_drive(folder, mount.filesystem if mount else "")


def _mount(device: str, path: Path, mountinfo: Path) -> _Mount | None:
    """The mount with this device number, else the mount that has `path`: btrfs gives subvolumes others."""
    mounts = _mounts(mountinfo)
    around = [mount for mount in mounts if path.is_relative_to(mount.point)]
    closest = max(around, key=lambda mount: len(mount.point.parts), default=None)
    return next((mount for mount in mounts if mount.device == device), closest)


def _mounts(mountinfo: Path) -> list[_Mount]:
    """Lines are `id parent major:minor root point options ... - type source options` (proc(5))."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return []
    mounts = []
    for line in lines:
        left, right = (part.split() for part in line.split(" - ", 1))
        mounts.append(_Mount(left[2], Path(left[4].replace("\\040", " ")), right[0], right[1]))
    return mounts


def _block_folder(device: str, sys: Path) -> Path | None:
    folder = sys / "dev/block" / device
    return _whole(folder) if folder.exists() else None


def _whole(folder: Path) -> Path:
    """The folder below /sys of the whole drive: a partition's folder lies in the drive's."""
    folder = folder.resolve()
    return folder.parent if (folder / "partition").exists() else folder


def _source_folder(mount: _Mount | None, sys: Path) -> Path | None:
    """The folder below /sys of a mount's source: btrfs and others mount a device under another number."""
    if mount is None or mount.filesystem in _NO_DRIVE or not mount.source.startswith("/dev/"):
        return None
    try:
        number = Path(mount.source).stat().st_rdev
    except OSError:
        return None
    return _block_folder(f"{os.major(number)}:{os.minor(number)}", sys)


def _block_drive(folder: Path, filesystem: str) -> Drive:
    name, nbytes = folder.name, int(_text(folder / "size") or 0) * _SECTOR_BYTES
    model = _first(folder, "device/model", "dm/name") or name
    serial = _first(folder, "device/serial", "serial", "wwid", "device/wwid", "dm/uuid", "md/uuid")
    parts = [model, serial, f"{nbytes / 1e9:.0f} GB"]
    slaves = folder / "slaves"
    return Drive(
        name,
        " ".join(part for part in parts if part),
        filesystem,
        _text(folder / "queue/rotational") == "1",
        nbytes,
        tuple(sorted({_whole(member).name for member in slaves.iterdir()})) if slaves.is_dir() else (),
    )


def _first(folder: Path, *files: str) -> str:
    return next((text for file in files if (text := _text(folder / file))), "")


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(errors="replace").replace("\0", "").split())
    except OSError:
        return ""
