"""Drives: what lies behind a folder, how fast it is read, how much is free."""

from __future__ import annotations

import re
from pathlib import Path

from moebox.instruments.doctor.checks.base import Check, Roots, Status, read_text, unmeasured
from moebox.instruments.doctor.checks.memory import LESS_THAN_BEFORE
from moebox.offload.machine.drive_speed import LEAST_BYTES, READ_BYTES, DriveSpeed
from moebox.offload.machine.drives import Drive
from moebox.offload.machine.profile import Part

K2_BYTES = 594_000_000_000
"""Kimi K2 with INT4 experts and a bf16 backbone."""
SLOW_GBPS = 2.0
"""Less than an NVMe drive of PCIe 3 with four lanes reads."""
LEAST_FREE_BYTES = 100_000_000
MAKE_MODEL = "`moebox synth MODEL --layers 2 --experts 16 --format int4`"
_IN_MEMORY = ("tmpfs", "ramfs")
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "fuse")
_VIRTUAL = re.compile(r"(vd|xvd)[a-z]+$")
"""Drives of virtual machines, which call themselves rotational whatever is behind them."""


def kind(drive: Drive) -> Check:
    """What sort of drive the shards lie on."""
    members = f" of {', '.join(drive.members)}" if drive.members else ""
    seen = f"{drive.identity}{members}, {drive.filesystem or 'file system unknown'}"
    if drive.filesystem in _IN_MEMORY:
        return Check(
            "drive.kind",
            "warn",
            seen,
            "The shards lie in memory, and the experts that are loaded take it a second time.",
            "Keep the checkpoint on a drive.",
            drive.name,
        )
    if drive.filesystem.partition(".")[0] in _REMOTE:
        return Check(
            "drive.kind",
            "warn",
            seen,
            "The shards are read through another machine or the host: slower, and gone when that is.",
            "Copy the checkpoint to a drive of this machine, or name one with a copy of it by --store.",
            drive.name,
        )
    if drive.rotational and not _VIRTUAL.match(drive.name):
        return Check(
            "drive.kind",
            "warn",
            f"{seen}, a spinning disk",
            "Each expert that is not in memory takes tenths of a second.",
            "Put the checkpoint on an NVMe drive.",
            drive.name,
        )
    return Check("drive.kind", "pass", seen, subject=drive.name)


def link(drive: Drive, roots: Roots) -> list[Check]:
    """The PCIe link of an NVMe drive, or of each in a RAID; nothing for other drives."""
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
    seen = f"{speed} x{width}"
    if (speed, width) == (most_speed, most_width):
        return Check("drive.link", "pass", seen, subject=name)
    return Check(
        "drive.link",
        "warn",
        f"{seen}; the drive can {most_speed} x{most_width}",
        "The slot, not the drive, limits how fast experts are read.",
        "Put the drive into a slot of its generation with all its lanes (the board's manual tells which).",
        name,
    )


def bandwidth(drive: Drive, speed: DriveSpeed | Exception | None, before: Part | None = None) -> Check:
    """How fast experts are read, by queue depth.

    Args:
        speed: just measured, or why it could not be; None where the files are too small to tell.
        before: the profile's figures of the same drive.
    """
    if isinstance(speed, Exception):
        return unmeasured("drive.bandwidth", speed, drive.name)
    if speed is None:
        return Check(
            "drive.bandwidth",
            "skip",
            f"less than {LEAST_BYTES / 1e6:.0f} MB of shards: a cache would be measured",
            fix=f"Name a larger model, or make one: {MAKE_MODEL}.",
            subject=drive.name,
        )
    figures = speed.figures()
    expert_s = READ_BYTES / 1e9 / speed.gbps
    curve = ", ".join(f"{gbps:.2f} at {depth}" for depth, gbps in speed.by_depth.items())
    seen = (
        f"{speed.gbps:.2f} GB/s, a K2 expert in {expert_s * 1e3:.1f} ms; depth {speed.depth} suffices\n"
        f"GB/s by reads under way: {curve}"
    )
    costs, fix = _slow(speed, before)
    if not speed.direct:
        costs = (
            "O_DIRECT is refused: reads go through the page cache, which costs a copy and memory, and the "
        )
        costs += "figures are the cache's where it holds the shards."
        fix = "Put the shards on a file system that allows O_DIRECT, such as ext4 or XFS."
    status: Status = "warn" if costs else "pass"
    return Check("drive.bandwidth", status, seen, costs, fix, drive.name, figures)


def _slow(speed: DriveSpeed, before: Part | None) -> tuple[str, str]:
    """What a slow drive costs and what to do; empty where it is not slow."""
    earlier = before.figures.get("gbps", 0.0) if before else 0.0
    if before and speed.gbps < LESS_THAN_BEFORE * earlier:
        return (
            f"On {before.measured[:10]} it was {earlier:.2f} GB/s: something slows it down.",
            "See whether other programs use it (`iostat -x 1`), or it is hot or worn (`nvme smart-log`).",
        )
    token_s = 480 * READ_BYTES / 1e9 / speed.gbps
    if speed.gbps < SLOW_GBPS:
        return (
            f"A K2 token takes {token_s:.1f} s if none of its 480 experts is in memory, and "
            f"{token_s / 10:.1f} s if one in ten is missing.",
            "Use an NVMe drive in a slot with four lanes, several drives (--store), or more memory.",
        )
    return "", ""


def not_measured() -> Check:
    """Without a model, or with a broken one, there is nothing to read."""
    return Check(
        "drive.bandwidth",
        "skip",
        "no shards to read, and nothing is written to measure with",
        fix=f"Run `moebox doctor MODEL`; {MAKE_MODEL} makes one for that, of 6 GB.",
    )


def space(folder: Path, what: str, free_bytes: int, need_bytes: int = LEAST_FREE_BYTES) -> Check:
    """Room for what is written to a folder.

    Args:
        what: is written there.
        need_bytes: what that takes.
    """
    seen = f"{free_bytes / 1e9:.1f} GB free for {what}"
    figures = {"free_bytes": float(free_bytes), "need_bytes": float(need_bytes)}
    if free_bytes >= need_bytes:
        return Check("drive.space", "pass", seen, subject=str(folder), figures=figures)
    return Check(
        "drive.space",
        "warn",
        f"{seen}, which takes {need_bytes / 1e9:.1f} GB",
        "It cannot be written.",
        "Free some space or use another drive; XDG_DATA_HOME moves what moebox keeps for itself.",
        str(folder),
        figures,
    )
