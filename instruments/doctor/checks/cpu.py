"""The CPU: its instruction set, the cores that moebox may use, whether they are free, NUMA nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from moebox.instruments.doctor.checks.base import Check, Roots, Topic, read_text
from moebox.instruments.measure.cpu_load import is_quiet
from moebox.kernels.cpu import allowed_cpus, isa_paths
from moebox.offload.machine.hardware import cpu_name
from moebox.units import GIGA


def instruction_set(paths: Sequence[str] | None = None) -> Check:
    """Which variant of the kernels runs; `paths` are those that can, best first, by default this
    machine's."""
    paths = isa_paths() if paths is None else paths
    topic, best = Topic("cpu.isa"), paths[0]
    seen = f"{cpu_name()}: {best}, the best of {', '.join(paths)}"
    if best == "scalar":
        return topic.warning(
            f"{cpu_name()}: no AVX2, plain code runs",
            "Experts are computed several times slower than the memory could deliver them.",
            "Use an x86 CPU with AVX2 or, better, AVX-512; in a virtual machine, pass the host's CPU through "
            "(`-cpu host`).",
        )
    if best == "avx2":
        return topic.warning(
            seen,
            "Arithmetic is the limit, not memory: experts were read at 57 to 68 % of the memory's bandwidth, "
            "with AVX-512 at 82 to 90 % (docs/benchmarks.md).",
            "Nothing on this CPU. If it has AVX-512 and a virtual machine hides it, pass the host's CPU "
            "through (`-cpu host`).",
        )
    return topic.passed(seen)


@dataclass(frozen=True)
class Cores:
    """CPUs of the machine, those in the affinity mask, and of the latter those within the cgroup's quota."""

    online: int
    physical: int
    affinity: int
    allowed: int

    @classmethod
    def of_this_machine(cls) -> Cores:
        """Ask the system."""
        online = psutil.cpu_count() or 1
        physical = psutil.cpu_count(logical=False) or online
        return cls(online, physical, len(os.sched_getaffinity(0)), allowed_cpus())


def cores(found: Cores | None = None) -> Check:
    """How many cores moebox computes on."""
    found = found or Cores.of_this_machine()
    figures = {"allowed": found.allowed, "online": found.online, "physical": found.physical}
    topic = Topic("cpu.cores", figures=figures)
    seen = f"{found.allowed} of {found.online} CPUs ({found.physical} cores)"
    if found.allowed >= min(found.online, found.physical) and found.allowed > 1:
        return topic.passed(seen)
    if found.allowed == found.online:
        return topic.warning(
            seen,
            "One core cannot read memory at its full rate, and beside a GPU it is taken by the host's part.",
            "Give the machine more cores.",
        )
    limits = []
    if found.affinity < found.online:
        limits.append(f"the affinity mask has {found.affinity}")
    if found.allowed < found.affinity:
        limits.append(f"the cgroup's quota is {found.allowed}")
    return topic.warning(
        f"{seen}: {' and '.join(limits)}",
        "Fewer cores read memory slower and compute prompts slower in proportion.",
        "Start moebox without `taskset`, or raise the container's CPU limit (`docker run --cpus`).",
    )


def load(busy: float, allowed: int) -> Check:
    """Whether other programs use the cores, which lowers the bandwidths that are measured."""
    topic = Topic("cpu.load", figures={"busy_cpus": busy})
    seen = f"other programs use {busy:.1f} CPUs of {allowed}"
    if is_quiet(busy, allowed):
        return topic.passed(seen)
    return topic.warning(
        seen,
        "The bandwidths below are lower than the machine's own, and so would tokens per second be.",
        "Stop the other programs and run `moebox doctor` again.",
    )


def numa(roots: Roots) -> Check:
    """How many memory nodes the cores read from."""
    nodes = _node_bytes(roots.sys / "devices/system/node")
    topic = Topic("cpu.numa", figures={f"node_{name}_bytes": float(size) for name, size in nodes.items()})
    if not nodes:
        return topic.passed("the system lists no NUMA nodes: all cores share one memory")
    sizes = ", ".join(f"node {name} {size / GIGA:.0f} GB" for name, size in nodes.items())
    with_memory = [name for name, size in nodes.items() if size]
    if len(with_memory) <= 1:
        return topic.passed(f"one node: {sizes}")
    return topic.warning(
        f"{len(with_memory)} nodes: {sizes}",
        "An expert that lies in one node is read by cores of the other over the link between the sockets, "
        "which is slower, and one node's memory may do all the work.",
        "Spread the memory over all nodes: `numactl --interleave=all moebox ...`.",
    )


def _node_bytes(folder: Path) -> dict[str, int]:
    """Node number -> bytes of memory, from lines such as `Node 0 MemTotal:  24684096 kB`."""
    nodes = {}
    for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        lines = (read_text(node / "meminfo") or "").splitlines()
        totals = [int(line.split()[-2]) * 1024 for line in lines if "MemTotal:" in line]
        nodes[node.name[4:]] = totals[0] if totals else 0
    return nodes
