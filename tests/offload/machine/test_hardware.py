"""Free memory respects the limits of cgroups, version 1 and 2, and of those above them."""

import psutil

from moebox.offload.machine.hardware import available_ram_bytes, cgroup_limits, cpu_identity, cpu_name

MIB = 1 << 20


def write(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_cgroups(tmp_path):
    free = available_ram_bytes(tmp_path, tmp_path / "absent")
    assert abs(free - psutil.virtual_memory().available) < 512 * MIB


def test_version_2_parent_limits_child(tmp_path):
    (tmp_path / "self").write_text("0::/box/job\n")
    write(tmp_path / "box", memory__max=100 * MIB, memory__current=60 * MIB)
    write(tmp_path / "box/job", memory__max="max", memory__current=50 * MIB)
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 40 * MIB


def test_the_page_cache_counts_as_free(tmp_path):
    (tmp_path / "self").write_text("0::/\n")
    write(tmp_path, memory__max=100 * MIB, memory__current=90 * MIB)
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MIB}\nactive_file {5 * MIB}\n")
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 35 * MIB


def test_version_1(tmp_path):
    (tmp_path / "self").write_text("5:cpu:/\n4:memory:/docker/x\n")
    write(tmp_path / "memory/docker/x", memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=70 * MIB)
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 0


def test_a_soft_limit_counts_too(tmp_path):
    (tmp_path / "self").write_text("0::/job\n")
    write(tmp_path / "job", memory__max="max", memory__high=100 * MIB, memory__current=30 * MIB)
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 70 * MIB


def test_limits_name_the_file_that_sets_them(tmp_path):
    (tmp_path / "self").write_text("0::/job\n")
    write(tmp_path / "job", memory__max=100 * MIB, memory__current=60 * MIB)
    (limit,) = cgroup_limits(tmp_path, tmp_path / "self")
    assert (limit.file, limit.limit_bytes, limit.used_bytes) == (
        tmp_path / "job/memory.max",
        100 * MIB,
        60 * MIB,
    )


def test_a_cpu_is_identified_by_name_and_threads(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nprocessor\t: 1\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Fast CPU @ 3 GHz"
    assert cpu_identity(3) == f"{cpu_name()}, 3 threads"
    assert cpu_identity(3) != cpu_identity(4)
