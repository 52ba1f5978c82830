"""Free memory honours cgroup limits, version 1 and 2, up the tree."""

import psutil

from moebox.offload.hardware import available_ram_bytes

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


def test_page_cache_is_not_lost(tmp_path):
    (tmp_path / "self").write_text("0::/\n")
    write(tmp_path, memory__max=100 * MIB, memory__current=90 * MIB)
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MIB}\nactive_file {5 * MIB}\n")
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 35 * MIB


def test_version_1(tmp_path):
    (tmp_path / "self").write_text("5:cpu:/\n4:memory:/docker/x\n")
    write(tmp_path / "memory/docker/x", memory__limit_in_bytes=64 * MIB, memory__usage_in_bytes=70 * MIB)
    assert available_ram_bytes(tmp_path, tmp_path / "self") == 0
