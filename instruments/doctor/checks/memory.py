"""RAM: how much there is, who limits it, how fast it is read, huge pages, locked memory."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping

import psutil
import torch

from moebox.config import ModelConfig
from moebox.instruments.doctor.checks.base import Check, Roots, read_text, unmeasured
from moebox.offload.machine.hardware import CgroupLimit, available_ram_bytes, cgroup_limits
from moebox.offload.machine.profile import Part
from moebox.runtime.engine.plan_parts import ram_room_bytes
from moebox.runtime.model.precision import planned_bytes
from moebox.units import gib

LESS_THAN_BEFORE = 0.75
"""Part of the bandwidth measured earlier below which something must have changed."""
PLAUSIBLE_GBPS = 8.0
"""Less than one channel of the slowest memory that such a CPU takes."""


def size(
    config: ModelConfig | None = None, total: int | None = None, available: int | None = None, vram: int = 0
) -> Check:
    """Memory of the machine and what is free; with a model, how many of its experts that holds. Bytes.

    Args:
        vram: free memory of the GPU, which holds the backbone and more experts.
    """
    total = psutil.virtual_memory().total if total is None else total
    available = available_ram_bytes() if available is None else available
    figures = {"total_bytes": float(total), "available_bytes": float(available)}
    seen = f"{gib(available)} free of {gib(total)}"
    if config is None:
        return Check("ram.size", "pass", seen, figures=figures)
    backbone_bytes = planned_bytes(config.backbone_shapes(), torch.bfloat16, "bf16")
    memory = ram_room_bytes(None, available)
    room = memory + max(vram - backbone_bytes, 0) if vram else max(memory - backbone_bytes, 0)
    where = "memory and the GPU" if vram else "memory"
    seen += f"; the experts take {gib(config.experts_bytes)}"
    if config.experts_bytes <= room:
        return Check("ram.size", "pass", f"{seen}, all fit {where}", figures=figures)
    return Check(
        "ram.size",
        "warn",
        f"{seen}, {room / config.experts_bytes:.0%} fit {where}",
        "The others are read from the drive whenever they are picked, and the drive sets the pace.",
        "`moebox plan MODEL` tells the tokens per second and what more memory would bring.",
        figures=figures,
    )


def limits(total: int | None = None, found: list[CgroupLimit] | None = None) -> Check:
    """Whether a container may use less memory than the machine has."""
    total = psutil.virtual_memory().total if total is None else total
    found = cgroup_limits() if found is None else found
    below = [limit for limit in found if limit.limit_bytes < total]
    if not below:
        return Check("ram.limit", "pass", "no cgroup limits the memory")
    least = min(below, key=lambda limit: limit.headroom_bytes)
    return Check(
        "ram.limit",
        "warn",
        f"{least.file} sets {gib(least.limit_bytes)} of {gib(total)}; {gib(least.headroom_bytes)} are left",
        "moebox keeps within it, so that fewer experts stay in memory.",
        "Raise the container's limit (`docker run --memory`, the unit's MemoryMax=) if the machine has more "
        "to give.",
        figures={"limit_bytes": float(least.limit_bytes), "headroom_bytes": float(least.headroom_bytes)},
    )


def bandwidth(figures: Mapping[str, float] | Exception, threads: int, before: Part | None = None) -> Check:
    """What the kernels' own reading loop gets out of RAM, beside what it got last time.

    Args:
        figures: `ram_gbps` and `cpu_tflops`, just measured, or why they could not be.
        before: the profile's figures of the same CPU and threads.
    """
    if isinstance(figures, Exception):
        return unmeasured("ram.bandwidth", figures)
    gbps = figures["ram_gbps"]
    seen = f"{gbps:.1f} GB/s read by {threads} threads; experts {figures['cpu_tflops']:.2f} TFLOP/s"
    earlier = before.figures.get("ram_gbps", 0.0) if before else 0.0
    if before and gbps < LESS_THAN_BEFORE * earlier:
        return Check(
            "ram.bandwidth",
            "warn",
            f"{seen}; on {before.measured[:10]} it was {earlier:.1f} GB/s",
            f"What is computed from RAM takes {earlier / gbps:.1f} times as long as then.",
            "See whether other programs run (cpu.load), or whether CPU or memory were slowed or exchanged.",
            figures=figures,
        )
    if gbps < PLAUSIBLE_GBPS:
        return Check(
            "ram.bandwidth",
            "warn",
            seen,
            f"A K2 token's experts, 11.9 GB, take {11.9 / gbps:.1f} s from this memory.",
            "See whether other programs run (cpu.load), and whether all memory channels are filled.",
            figures=figures,
        )
    return Check("ram.bandwidth", "pass", seen, figures=figures)


def huge_pages(roots: Roots) -> Check:
    """Whether the slab of experts gets huge pages, which it asks for."""
    text = read_text(roots.sys / "kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text or "")
    if chosen is None:
        seen = "this kernel has no transparent huge pages"
    elif chosen[1] == "never":
        seen = "transparent huge pages are switched off (never)"
    else:
        return Check("ram.huge-pages", "pass", f"transparent huge pages: {chosen[1]}")
    return Check(
        "ram.huge-pages",
        "warn",
        seen,
        "Experts lie in pages of 4 KiB: loading and pinning them takes longer, and reading misses the "
        "address cache.",
        "As root: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`."
        if chosen
        else "Use a kernel with CONFIG_TRANSPARENT_HUGEPAGE.",
    )


def locked(has_gpu: bool, need: int | None = None, limit: int | None = None) -> Check:
    """Whether experts in RAM may be pinned for a GPU.

    Args:
        has_gpu: without one nothing is pinned.
        need: bytes to pin; free memory by default.
        limit: RLIMIT_MEMLOCK in bytes, -1 for none; the process's by default.
    """
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    seen = "unlimited" if limit == resource.RLIM_INFINITY else f"{gib(limit)} may be locked"
    if not has_gpu:
        return Check("ram.locked", "skip", f"{seen}; without a GPU nothing is pinned")
    need = available_ram_bytes() if need is None else need
    if limit == resource.RLIM_INFINITY or limit >= need:
        return Check("ram.locked", "pass", seen)
    return Check(
        "ram.locked",
        "warn",
        f"{seen}, free memory is {gib(need)}",
        "A driver that counts pinned memory against it refuses to pin the experts, and the model does not "
        "load.",
        "`ulimit -l unlimited`, `docker run --ulimit memlock=-1`, or LimitMEMLOCK=infinity in the unit.",
    )
