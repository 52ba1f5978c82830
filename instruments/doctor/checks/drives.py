"""Drives: the kind of drive that holds the shards, its link and bandwidth, and free space."""

from __future__ import annotations

import re
from pathlib import Path

from moebox.instruments.doctor.checks.base import Check, Roots, Topic, much_faster_earlier, read_text
from moebox.offload.machine.drive_speed import LEAST_BYTES, READ_BYTES, DriveSpeed
from moebox.offload.machine.drives import Drive
from moebox.offload.machine.profile import Part
from moebox.units import GIGA

SLOW_GBPS = 2.0
"""Less than an NVMe drive reads over four lanes of PCIe 3."""
K2_PICKS = 480
"""Experts that a token of Kimi K2 picks: 8 in each of 60 layers."""
LEAST_FREE_BYTES = 100_000_000
MAKE_MODEL = "`moebox synth MODEL --layers 2 --experts 16 --format int4`"
_IN_MEMORY = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "fuse")
_VIRTUAL = re.compile(r"(vd|xvd)[a-z]+$")
"""Drives of virtual machines, which are reported as rotational whatever the host's drive is."""


def kind(drive: Drive) -> Check:
    """What kind of drive the shards lie on."""
    topic = Topic("drive.kind", drive.name)
    members = f" of {', '.join(drive.members)}" if drive.members else ""
    seen = f"{drive.identity}{members}, {drive.filesystem or 'file system unknown'}"
    if drive.filesystem in _IN_MEMORY:
        return topic.warning(
            seen,
            "The shards lie in memory, and the experts that are loaded take it a second time.",
            "Keep the checkpoint on a drive.",
        )
    if drive.filesystem.partition(".")[0] in _REMOTE:
        return topic.warning(
            seen,
            "The shards are read through another machine or the host: slower, and gone when that is.",
            "Copy the checkpoint to a drive of this machine, or name one with a copy of it by --store.",
        )
    if drive.rotational and not _VIRTUAL.match(drive.name):
        return topic.warning(
            f"{seen}, a spinning disk",
            "Each expert that is not in memory takes tenths of a second.",
            "Put the checkpoint on an NVMe drive.",
        )
    return topic.passed(seen)


def links(drive: Drive, roots: Roots) -> list[Check]:
    """The PCIe link of an NVMe drive, or of each NVMe drive of a RAID; nothing for other drives."""
    checks = (
        _link(name, roots.sys / "block" / name / "device/device") for name in drive.members or [drive.name]
    )
    return [check for check in checks if check]


def _link(name: str, folder: Path) -> Check | None:
    speed, most_speed, width, most_width = (
        read_text(folder / f"{which}_link_{what}")
        for what in ("speed", "width")
        for which in ("current", "max")
    )
    if not (speed and most_speed and width and most_width):
        return None
    topic, seen = Topic("drive.link", name), f"{speed} x{width}"
    if (speed, width) == (most_speed, most_width):
        return topic.passed(seen)
    return topic.warning(
        f"{seen}; the drive can {most_speed} x{most_width}",
        "The slot, not the drive, limits how fast experts are read.",
        "Put the drive into a slot of its generation with all its lanes (the board's manual tells which).",
    )


def bandwidth(drive: Drive, speed: DriveSpeed | Exception | None, before: Part | None = None) -> Check:
    """How fast experts are read, by queue depth.

    Args:
        drive: the drive.
        speed: just measured; or the error of the measurement; None: the files are too small to measure.
        before: the profile's figures of the same drive.
    """
    topic = Topic("drive.bandwidth", drive.name)
    if isinstance(speed, Exception):
        return topic.not_measured(speed)
    if speed is None:
        return topic.skipped(
            f"less than {LEAST_BYTES / 1e6:.0f} MB of shards: a cache would be measured",
            f"Name a larger model, or make one: {MAKE_MODEL}.",
        )
    topic = Topic(topic.id, drive.name, speed.figures())
    expert_s = READ_BYTES / GIGA / speed.gbps
    curve = ", ".join(f"{gbps:.2f} at {depth}" for depth, gbps in speed.by_depth.items())
    seen = (
        f"{speed.gbps:.2f} GB/s, a K2 expert in {expert_s * 1e3:.1f} ms; depth {speed.depth} suffices\n"
        f"GB/s by reads under way: {curve}"
    )
    slow = _why_slow(speed, before)
    return topic.passed(seen) if slow is None else topic.warning(seen, *slow)


def _why_slow(speed: DriveSpeed, before: Part | None) -> tuple[str, str] | None:
    """What a slow drive costs and what to do; None if it is not slow."""
    if not speed.direct:
        return (
            "O_DIRECT is refused: reads go through the page cache, which costs a copy and memory, and the "
            "figures are the cache's where it holds the shards.",
            "Put the shards on a file system that allows O_DIRECT, such as ext4 or XFS.",
        )
    earlier = much_faster_earlier(before, "gbps", speed.gbps)
    if earlier:
        return (
            f"On {earlier.day} it was {earlier.gbps:.2f} GB/s: something slows it down.",
            "See whether other programs use it (`iostat -x 1`), or it is hot or worn (`nvme smart-log`).",
        )
    if speed.gbps < SLOW_GBPS:
        token_s = K2_PICKS * READ_BYTES / GIGA / speed.gbps
        return (
            f"A K2 token takes {token_s:.1f} s if none of its {K2_PICKS} experts is in memory, and "
            f"{token_s / 10:.1f} s if one in ten is missing.",
            "Use an NVMe drive in a slot with four lanes, several drives (--store), or more memory.",
        )
    return None


def not_measured() -> Check:
    """The result without a model, or with a broken one, whose shards cannot be read."""
    return Topic("drive.bandwidth").skipped(
        "no shards to read, and nothing is written to measure with",
        f"Run `moebox doctor MODEL`; {MAKE_MODEL} makes one for that, of 6 GB.",
    )


def space(folder: Path, what: str, free_bytes: int, need_bytes: int = LEAST_FREE_BYTES) -> Check:
    """Free space for what is written to a folder.

    Args:
        folder: the folder.
        what: is written there, for people.
        free_bytes: free space.
        need_bytes: space that is needed.
    """
    figures = {"free_bytes": float(free_bytes), "need_bytes": float(need_bytes)}
    topic = Topic("drive.space", str(folder), figures)
    seen = f"{free_bytes / GIGA:.1f} GB free for {what}"
    if free_bytes >= need_bytes:
        return topic.passed(seen)
    return topic.warning(
        f"{seen}, which takes {need_bytes / GIGA:.1f} GB",
        "It cannot be written.",
        "Free some space or use another drive; XDG_DATA_HOME moves what moebox keeps for itself.",
    )
