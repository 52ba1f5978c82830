"""Checks of the CPU: this machine's, and made-up ones."""

import pytest

from moebox.instruments.doctor.checks import cpu
from moebox.instruments.doctor.checks.base import Roots
from moebox.instruments.doctor.checks.cpu import Cores
from moebox.instruments.measure.cpu_load import busy_cpus


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_this_machine():
    assert cpu.instruction_set().status in ("pass", "warn")
    assert cpu.cores().figures["allowed"] >= 1
    assert cpu.numa(Roots()).seen
    assert busy_cpus() >= 0


@pytest.mark.parametrize(
    ("paths", "status", "words"),
    [
        (["amx", "avx512bf16", "avx512", "avx2", "scalar"], "pass", ""),
        (["avx512", "avx2", "scalar"], "pass", ""),
        (["avx2", "scalar"], "warn", "Arithmetic is the limit"),
        (["scalar"], "warn", "several times slower"),
    ],
)
def test_instruction_sets(paths, status, words):
    check = cpu.instruction_set(paths)
    assert check.status == status
    assert words in check.costs
    assert bool(check.fix) == (status == "warn")


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        (Cores(online=32, physical=16, affinity=32, allowed=32), "pass", "32 of 32"),
        (Cores(online=32, physical=16, affinity=16, allowed=16), "pass", "16 of 32"),
        (Cores(online=32, physical=16, affinity=4, allowed=4), "warn", "affinity mask has 4"),
        (Cores(online=32, physical=16, affinity=32, allowed=8), "warn", "quota is 8"),
        (
            Cores(online=32, physical=16, affinity=8, allowed=2),
            "warn",
            "mask has 8 and the cgroup's quota is 2",
        ),
        (Cores(online=1, physical=1, affinity=1, allowed=1), "warn", "1 of 1"),
    ],
)
def test_cores(found, status, words):
    check = cpu.cores(found)
    assert check.status == status
    assert words in check.seen
    assert check.figures["allowed"] == found.allowed


def test_other_programs_are_a_warning_above_a_tenth_of_the_cpus():
    assert cpu.load(busy=1.2, allowed=16).status == "pass"
    busy = cpu.load(busy=4.0, allowed=16)
    assert busy.status == "warn"
    assert "4.0 CPUs of 16" in busy.seen


def test_one_node(tmp_path):
    nodes = tmp_path / "devices/system/node"
    write(nodes / "node0/meminfo", "Node 0 MemTotal:       24684096 kB\nNode 0 MemFree: 1 kB\n")
    check = cpu.numa(Roots(sys=tmp_path))
    assert check.status == "pass"
    assert check.figures == {"node_0_bytes": 24684096 * 1024}


def test_two_nodes_are_a_warning(tmp_path):
    nodes = tmp_path / "devices/system/node"
    for number in (0, 1, 10):
        size = 0 if number == 10 else 250_000_000
        write(nodes / f"node{number}/meminfo", f"Node {number} MemTotal:   {size} kB\n")
    write(nodes / "possible", "0-10")
    check = cpu.numa(Roots(sys=tmp_path))
    assert check.status == "warn"
    assert check.seen.startswith("2 nodes: node 0 256 GB, node 1 256 GB, node 10 0 GB")
    assert "numactl" in check.fix


def test_a_kernel_without_nodes(tmp_path):
    assert cpu.numa(Roots(sys=tmp_path)).status == "pass"
