"""RAM: its size, its limits, its bandwidth, huge pages, locked memory."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping

import psutil
import torch

from moebox.config import ModelConfig
from moebox.instruments.doctor.checks.base import Check, Roots, Topic, much_faster_earlier, read_text
from moebox.offload.machine.hardware import CgroupLimit, available_ram_bytes, cgroup_limits
from moebox.offload.machine.profile import Part
from moebox.runtime.engine.plan_parts import ram_room_bytes
from moebox.runtime.model.precision import planned_bytes
from moebox.units import gib

PLAUSIBLE_GBPS = 8.0
"""Less than one channel of the slowest memory that a supported CPU uses."""
K2_TOKEN_GB = 11.9
"""The experts that a token of Kimi K2 picks, in GB."""


def size(
    config: ModelConfig | None = None, total: int | None = None, available: int | None = None, vram: int = 0
) -> Check:
    """Memory of the machine and the free part of it; with a model, the share of its experts that fits.

    Args:
        config: of the model.
        total, available: bytes of RAM; by default this machine's.
        vram: free bytes of the GPU, which holds the backbone and more experts; 0: there is none.
    """
    total = psutil.virtual_memory().total if total is None else total
    available = available_ram_bytes() if available is None else available
    topic = Topic("ram.size", figures={"total_bytes": float(total), "available_bytes": float(available)})
    seen = f"{gib(available)} free of {gib(total)}"
    if config is None:
        return topic.passed(seen)
    backbone_bytes = planned_bytes(config.backbone_shapes(), torch.bfloat16, "bf16")
    memory = ram_room_bytes(None, available)
    room = memory + max(vram - backbone_bytes, 0) if vram else max(memory - backbone_bytes, 0)
    where = "memory and the GPU" if vram else "memory"
    seen += f"; the experts take {gib(config.experts_bytes)}"
    if config.experts_bytes <= room:
        return topic.passed(f"{seen}, all fit {where}")
    return topic.warning(
        f"{seen}, {room / config.experts_bytes:.0%} fit {where}",
        "The others are read from the drive whenever they are picked, and the drive sets the pace.",
        "`moebox plan MODEL` shows the tokens per second, and what more memory would bring.",
    )


def limits(total: int | None = None, found: list[CgroupLimit] | None = None) -> Check:
    """Whether a cgroup allows less memory than the machine has."""
    total = psutil.virtual_memory().total if total is None else total
    found = cgroup_limits() if found is None else found
    below = [limit for limit in found if limit.limit_bytes < total]
    if not below:
        return Topic("ram.limit").passed("no cgroup limits the memory")
    least = min(below, key=lambda limit: limit.headroom_bytes)
    figures = {"limit_bytes": float(least.limit_bytes), "headroom_bytes": float(least.headroom_bytes)}
    return Topic("ram.limit", figures=figures).warning(
        f"{least.file} sets {gib(least.limit_bytes)} of {gib(total)}; {gib(least.headroom_bytes)} are left",
        "moebox keeps within it, so that fewer experts stay in memory.",
        "Raise the container's limit (`docker run --memory`, the unit's MemoryMax=) if the machine has more "
        "to give.",
    )


def bandwidth(figures: Mapping[str, float] | Exception, threads: int, before: Part | None = None) -> Check:
    """Bandwidth of RAM, read by the kernels' own loop, beside the earlier measurement.

    Args:
        figures: `ram_gbps` and `cpu_tflops`, just measured; or the error of the measurement.
        threads: that read.
        before: the profile's figures of the same CPU and threads.
    """
    if isinstance(figures, Exception):
        return Topic("ram.bandwidth").not_measured(figures)
    topic, gbps = Topic("ram.bandwidth", figures=figures), figures["ram_gbps"]
    seen = f"{gbps:.1f} GB/s read by {threads} threads; experts {figures['cpu_tflops']:.2f} TFLOP/s"
    earlier = much_faster_earlier(before, "ram_gbps", gbps)
    if earlier:
        return topic.warning(
            f"{seen}; on {earlier.day} it was {earlier.gbps:.1f} GB/s",
            f"What is computed from RAM takes {earlier.gbps / gbps:.1f} times as long as then.",
            "See whether other programs run (cpu.load), or whether CPU or memory were slowed or exchanged.",
        )
    if gbps < PLAUSIBLE_GBPS:
        return topic.warning(
            seen,
            f"A K2 token's experts, {K2_TOKEN_GB} GB, take {K2_TOKEN_GB / gbps:.1f} s from this memory.",
            "See whether other programs run (cpu.load), and whether all memory channels are filled.",
        )
    return topic.passed(seen)


def huge_pages(roots: Roots) -> Check:
    """Whether the slab of experts gets the huge pages that it asks for."""
    topic = Topic("ram.huge-pages")
    text = read_text(roots.sys / "kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", text or "")
    if chosen and chosen[1] != "never":
        return topic.passed(f"transparent huge pages: {chosen[1]}")
    if chosen:
        seen = "transparent huge pages are switched off (never)"
        fix = "As root: `echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`."
    else:
        seen = "this kernel has no transparent huge pages"
        fix = "Use a kernel with CONFIG_TRANSPARENT_HUGEPAGE."
    costs = (
        "Experts lie in pages of 4 KiB: loading and pinning them takes longer, and reading misses the "
        "address cache."
    )
    return topic.warning(seen, costs, fix)


def locked(has_gpu: bool, need: int | None = None, limit: int | None = None) -> Check:
    """Whether experts in RAM may be pinned for a GPU.

    Args:
        has_gpu: without a GPU nothing is pinned.
        need: bytes to pin; by default the free memory.
        limit: RLIMIT_MEMLOCK in bytes, -1 for unlimited; by default this process's.
    """
    topic = Topic("ram.locked")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    seen = "unlimited" if limit == resource.RLIM_INFINITY else f"{gib(limit)} may be locked"
    if not has_gpu:
        return topic.skipped(f"{seen}; without a GPU nothing is pinned")
    need = available_ram_bytes() if need is None else need
    if limit == resource.RLIM_INFINITY or limit >= need:
        return topic.passed(seen)
    return topic.warning(
        f"{seen}, free memory is {gib(need)}",
        "A driver that counts pinned memory against it refuses to pin the experts, and the model does not "
        "load.",
        "`ulimit -l unlimited`, `docker run --ulimit memlock=-1`, or LimitMEMLOCK=infinity in the unit.",
    )
