"""GPU counter, RAPL zones and stated watts, each compared with a known energy."""

import contextlib
import gc
import os
import sys
import tempfile
import threading
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.power import Clock, SteppingGpu, set_counter, write_zone
from moebox.cost.energy.gpu_energy import STEP_S, GpuEnergy, NvmlReader, open_gpu
from moebox.cost.energy.power_model import PowerModel
from moebox.cost.energy.power_sources import ModelEnergy, open_sources
from moebox.cost.energy.rapl import RaplEnergy, open_rapl
from moebox.errors import DeviceError, MoeboxError

# GPU


def settled_gpu(watts, phase=0.03):
    """A GPU that has drawn `watts` for a long time, and was read often."""
    clock = Clock()
    gpu = SteppingGpu(clock, watts, phase)
    energy = GpuEnergy(gpu, clock)
    for _ in range(200):
        clock.wait(0.011)
        energy.joules()
    return clock, gpu, energy


def test_a_window_shorter_than_a_step_gets_power_times_time():
    clock, gpu, energy = settled_gpu(500.0)
    for _ in range(40):
        before, counter = energy.joules(), gpu.millijoules()
        clock.wait(0.05)
        assert energy.joules() - before == pytest.approx(25.0, rel=1e-3)
        assert (gpu.millijoules() - counter) / 1e3 in (pytest.approx(0.0), pytest.approx(50.0, rel=1e-3))


def test_a_long_window_gets_the_counters_joules_whatever_the_power_at_its_ends():
    clock, gpu, energy = settled_gpu(100.0)
    before = energy.joules()
    gpu.draw(700.0)
    clock.wait(60.0)
    gpu.draw(100.0)
    assert energy.joules() - before == pytest.approx(60 * 700.0, rel=0.1 / 60)


def test_a_step_that_comes_late_is_not_lost():
    """The counter does not move for 90 ms, while 700 W are drawn that the power reading does not show."""
    clock = Clock()
    gpu = SteppingGpu(clock, 0.0)
    energy = GpuEnergy(gpu, clock)
    gpu.draw(700.0)
    gpu.watts = lambda: 0.0
    clock.wait(0.09)
    assert energy.joules() == 0.0
    clock.wait(0.02)
    assert energy.joules() == pytest.approx(70.0)


@given(
    phase=st.floats(0, 0.1),
    moves=st.lists(st.tuples(st.floats(0, 3), st.floats(0, 700)), min_size=1, max_size=40),
)
def test_the_error_is_at_most_one_step(phase, moves):
    clock = Clock()
    gpu = SteppingGpu(clock, 300.0, phase)
    energy = GpuEnergy(gpu, clock)
    began, last = gpu.drawn(clock()), 0.0
    for seconds, watts in moves:
        clock.wait(seconds)
        gpu.draw(watts)
        joules = energy.joules()
        assert joules >= last
        # An error of half a step at the begin, of a whole one at the end, and of the millijoules cut off.
        assert abs(joules - (gpu.drawn(clock()) - began)) <= 1.5 * STEP_S * 700 + 0.01
        last = joules


def test_a_counter_that_restarts_from_0_takes_no_joules_back():
    clock, gpu, energy = settled_gpu(100.0)
    before = energy.joules()
    gpu._changes = [(0.0, -gpu.drawn(clock()) + 50.0, 100.0)]
    clock.wait(1.0)
    assert before <= energy.joules() <= before + 10
    clock.wait(1.0)
    assert energy.joules() == pytest.approx(before + 100.0, abs=11)


def test_the_method_of_windows_below_a_second_is_power():
    energy = GpuEnergy(SteppingGpu(Clock()), Clock())
    assert [energy.method(seconds) for seconds in (0.0, 0.99, 1.0, 60.0)] == [
        "power",
        "power",
        "counter",
        "counter",
    ]


class NVMLError(Exception):
    """Stands in for the error of pynvml."""


def nvml(counter=2_500, instant=350_000, average=300_000):
    """Stands in for pynvml with one GPU; a reading of None is one that NVML does not support."""

    def reading(value):
        def read(*handle):
            if value is None:
                raise NVMLError("Not Supported")
            return value

        return read

    def handle(uuid):
        if uuid != "GPU-1234":
            raise NVMLError("Not Found")
        return uuid

    field = types.SimpleNamespace(
        nvmlReturn=3 if instant is None else 0, value=types.SimpleNamespace(uiVal=instant)
    )
    return types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_SUCCESS=0,
        NVML_FI_DEV_POWER_INSTANT=186,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=reading(counter),
        nvmlDeviceGetFieldValues=lambda handle, ids: [field],
        nvmlDeviceGetPowerUsage=reading(average),
    )


def test_the_present_power_is_preferred_to_the_average(caplog):
    reader = NvmlReader(nvml(), "GPU-1234")
    assert (reader.millijoules(), reader.watts()) == (2_500, 350.0)
    assert NvmlReader(nvml(instant=None), "GPU-1234").watts() == 300.0
    assert not caplog.text
    assert NvmlReader(nvml(instant=None, average=None), "GPU-1234").watts() == 0.0
    assert "no power reading" in caplog.text


def test_a_gpu_without_an_energy_counter_is_refused_by_name():
    with pytest.raises(DeviceError, match="GPU-5678: Not Found"):
        NvmlReader(nvml(), "GPU-5678")
    with pytest.raises(DeviceError, match="no energy counter: Not Supported"):
        NvmlReader(nvml(counter=None), "GPU-1234")


def test_a_gpu_that_is_lost_later_raises_an_error():
    module = nvml()
    reader = NvmlReader(module, "GPU-1234")
    module.nvmlDeviceGetTotalEnergyConsumption = nvml(counter=None).nvmlDeviceGetTotalEnergyConsumption
    module.nvmlDeviceGetFieldValues = nvml(counter=None).nvmlDeviceGetTotalEnergyConsumption
    with pytest.raises(DeviceError, match="no energy counter"):
        reader.millijoules()
    with pytest.raises(DeviceError, match="no power any more"):
        reader.watts()


@pytest.fixture
def cuda_uuid(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_device_is_found_by_its_uuid(cuda_uuid, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert open_gpu(torch.device("cuda", 0)).source == "gpu"
    assert open_gpu(torch.device("cpu")) is None
    assert open_gpu(None) is None


def test_a_missing_counter_or_package_is_logged_once(cuda_uuid, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(counter=None))
    assert open_gpu(torch.device("cuda", 0)) is None
    assert "Not Supported: the GPU's energy is not measured" in caplog.text

    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu(torch.device("cuda", 0)) is None
    assert "nvidia-ml-py is missing" in caplog.text
    assert len(caplog.records) == 2


# RAPL


def joules_by_source(parts):
    return {part.source: part.joules() for part in parts}


@contextlib.contextmanager
def opened(root):
    parts = open_rapl(root)
    yield parts
    for part in parts:
        part.close()


def test_packages_and_their_memory_are_summed_and_parts_of_them_left_out(tmp_path):
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "package-1-die-0",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    files = {zone: write_zone(tmp_path, zone, name, 7_000_000) for zone, name in zones.items()}
    with opened(tmp_path) as parts:
        for power, file in enumerate(files.values()):
            set_counter(file, 7_000_000 + 10**power * 1_000_000)
        assert joules_by_source(parts) == {"cpu": 1 + 1000, "dram": 100 + 10_000}
        assert [part.method(0.001) for part in parts] == ["counter", "counter"]


def test_a_counter_that_wraps_goes_on(tmp_path):
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
    with opened(tmp_path) as (cpu,):
        set_counter(file, 671_150)
        assert cpu.joules() == pytest.approx(1.0)
        set_counter(file, 1_671_150)
        assert cpu.joules() == pytest.approx(2.0)


def test_a_thread_reads_a_counter_that_wraps_between_two_calls(tmp_path):
    """At `MAX_WATTS` a range of 2 J wraps within 2 ms, so the thread reads it every millisecond."""
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=2_000_000)
    read = threading.Event()

    class Watched(RaplEnergy):
        def joules(self):
            joules = super().joules()
            read.set()
            return joules

    cpu = Watched("cpu", [file.parent])
    for second in range(1, 9):
        set_counter(file, second * 1_500_000 % 2_000_000)
        for _ in range(2):  # the first may have begun before the file was replaced
            read.clear()
            assert read.wait(60)
    assert cpu.joules() == pytest.approx(12.0)
    cpu.close()


def rapl_threads():
    return [thread for thread in threading.enumerate() if thread.name == "moebox-rapl"]


def test_the_thread_ends_with_its_source(tmp_path):
    file = write_zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=2_000_000)
    before = set(rapl_threads())
    closed, forgotten = RaplEnergy("cpu", [file.parent]), RaplEnergy("cpu", [file.parent])
    threads = set(rapl_threads()) - before
    assert len(threads) == 2
    closed.close()
    del forgotten
    gc.collect()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def without_rights():
    """As the user nobody, since root may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_counters_for_root_only_are_logged_with_the_fix(caplog):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        write_zone(root, "intel-rapl:0", "package-0").chmod(0o400 if os.geteuid() == 0 else 0)
        write_zone(root, "intel-rapl:0:0", "dram", 5)
        with without_rights(), opened(root) as parts:
            assert joules_by_source(parts) == {"dram": 0.0}
    (record,) = caplog.records
    assert "energy of cpu is estimated" in record.message
    assert "intel-rapl:0/energy_uj may be read by root only" in record.message
    assert f"sudo chmod a+r {root}/intel-rapl:*/energy_uj" in record.message


def test_one_unreadable_package_of_two_leaves_both_out(tmp_path, caplog):
    write_zone(tmp_path, "intel-rapl:0", "package-0")
    broken = write_zone(tmp_path, "intel-rapl:1", "package-1")
    broken.write_text("unknown\n")
    with opened(tmp_path) as parts:
        assert parts == []
    assert f"{broken} holds no number but 'unknown'" in caplog.text


def test_a_zone_that_vanishes_is_an_error(tmp_path):
    file = write_zone(tmp_path, "intel-rapl:0", "package-0")
    with opened(tmp_path) as (cpu,):
        file.unlink()
        with pytest.raises(DeviceError, match="energy_uj cannot be read: No such file"):
            cpu.joules()


# Stated watts, and all sources together


def test_the_model_counts_watts_and_working_cores():
    clock, cores = Clock(), Clock()
    cpu = ModelEnergy("cpu", 60.0, 5.0, clock, cores)
    clock.wait(10.0)
    cores.wait(30.0)
    assert cpu.joules() == pytest.approx(60 * 10 + 5 * 30)
    assert cpu.method(1e9) == "estimated"


def test_the_model_counts_the_core_seconds_of_this_process():
    cpu = ModelEnergy("cpu", 0.0, 1.0)
    sum(range(1_000_000))
    assert cpu.joules() > 0


@pytest.mark.parametrize("watts", [-1.0, float("nan"), float("inf")])
def test_watts_that_are_no_number_of_0_or_more_are_refused(watts):
    with pytest.raises(MoeboxError, match=f"watts_per_core is {watts}"):
        PowerModel(watts_per_core=watts)


def test_parts_without_a_counter_are_estimated_and_a_gpu_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "moebox")
    write_zone(tmp_path, "intel-rapl:0", "package-0")
    sources = open_sources(torch.device("cpu"), PowerModel(), tmp_path)
    assert [(part.source, part.method(60)) for part in sources] == [("cpu", "counter"), ("dram", "estimated")]
    assert f"energy of dram is estimated: {tmp_path} has no zone of it" in caplog.text
    for part in sources:
        part.close()

    nothing = open_sources(None, PowerModel(), tmp_path / "missing")
    assert [(part.source, part.method(60)) for part in nothing] == [
        ("cpu", "estimated"),
        ("dram", "estimated"),
    ]


def test_all_three_sources_are_in_their_order(cuda_uuid, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    write_zone(tmp_path, "intel-rapl:0:1", "dram")
    sources = open_sources(torch.device("cuda", 0), PowerModel(), tmp_path)
    assert [(part.source, part.method(60)) for part in sources] == [
        ("gpu", "counter"),
        ("cpu", "estimated"),
        ("dram", "counter"),
    ]
    for part in sources:
        part.close()
