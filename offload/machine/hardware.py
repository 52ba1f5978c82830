"""The machine's CPU and GPU by name, and its free memory within the limits of a container."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from moebox.kernels.cpu import allowed_cpus

CGROUP_ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's model name."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def cpu_identity(threads: int | None = None) -> str:
    """The name under which the machine's profile keeps figures of the CPU with so many threads.

    None stands for all threads that this process may use.
    """
    return f"{cpu_name()}, {threads or allowed_cpus()} threads"


def gpu_identity(device: torch.device) -> str:
    """The name under which the machine's profile keeps a CUDA device's figures: its name and UUID."""
    if device.type != "cuda":
        return "stand-in"
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_properties(device).uuid}"


def available_ram_bytes(cgroup_root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process can take without swapping: the lesser of the machine's and its cgroups'."""
    available = int(psutil.virtual_memory().available)
    return min([available, *(limit.headroom_bytes for limit in cgroup_limits(cgroup_root, membership))])


@dataclass(frozen=True)
class CgroupLimit:
    """A memory limit of this process: the file that sets it, its bytes, and the bytes in use."""

    file: Path
    limit_bytes: int
    used_bytes: int

    @property
    def headroom_bytes(self) -> int:
        """Bytes up to the limit."""
        return max(self.limit_bytes - self.used_bytes, 0)


def cgroup_limits(root: Path = CGROUP_ROOT, membership: Path = MEMBERSHIP) -> list[CgroupLimit]:
    """The memory limits of this process's cgroup and of all cgroups above it."""
    limits = []
    for controller, limit, usage in (
        ("", "memory.max", "memory.current"),
        ("", "memory.high", "memory.current"),  # above it the kernel slows the process down
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder = root / controller
        own = _own_cgroup(membership, controller)
        for path in dict.fromkeys([folder, *(folder / own for own in _ancestors(own))]):
            limit_bytes, used_bytes = _read_number(path / limit), _read_number(path / usage)
            if limit_bytes is not None and used_bytes is not None:
                # The page cache counts as used, but the kernel frees it when a process needs memory.
                used_bytes -= _reclaimable_bytes(path)
                limits.append(CgroupLimit(path / limit, limit_bytes, used_bytes))
    return limits


def _own_cgroup(membership: Path, controller: str) -> str:
    """The process's path below a controller's hierarchy, from lines `id:controllers:path`."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.strip("/")
    return ""


def _ancestors(path: str) -> list[str]:
    parts = path.split("/") if path else []
    return ["/".join(parts[: length + 1]) for length in range(len(parts))]


def _reclaimable_bytes(path: Path) -> int:
    try:
        fields = dict(line.split(" ", 1) for line in (path / "memory.stat").read_text().splitlines())
        return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
    except (OSError, ValueError):
        return 0


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
