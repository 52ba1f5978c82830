"""benchmarks/energy.py with a stand-in for the GPU, and its message without a GPU."""

import importlib.util
import json
import multiprocessing
import sys
import threading
import time
import types

import pytest
import torch

from helpers.paths import ROOT
from helpers.power import SteppingGpu
from moebox.cost.energy.gpu_energy import GpuEnergy
from moebox.cost.energy.meter import EnergyMeter

PATH = ROOT / "benchmarks" / "energy.py"


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("energy_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_counter_is_linear_between_two_steps(benchmark):
    trace = benchmark.Trace([10.0, 10.1, 10.2], [500.0, 520.0, 590.0])
    assert trace.until(10.05) == pytest.approx(510.0)
    assert trace.between(10.05, 10.15) == pytest.approx(45.0)
    assert trace.until(10.3) == pytest.approx(660.0)


def test_overlapping_requests_are_compared_together_and_short_ones_one_by_one(benchmark):
    trace = benchmark.Trace([0.0, 10.0], [0.0, 1000.0])
    served = [benchmark.Served(1.0, 4.0, 300.0, 50.0, 50.0), benchmark.Served(3.0, 5.0, 120.0, 50.0, 50.0)]
    whole = benchmark.Round("2 at once", served).compare(trace)
    assert (whole["seconds"], whole["outside_joules"]) == (4.0, pytest.approx(400.0))
    assert whole["difference_percent"] == pytest.approx(5.0)
    assert benchmark.Round("short", served).compare(trace)["outside_joules"] == pytest.approx(500.0)


@pytest.mark.slow
def test_a_run_with_a_stand_in(benchmark, monkeypatch, capsys):
    for name, seconds in {"REQUEST_S": 0.2, "SHORT_S": 0.02, "PAUSE_S": 0.02}.items():
        monkeypatch.setattr(benchmark, name, seconds)
    gpu = SteppingGpu(time.monotonic, 400.0)
    nvml = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: gpu.millijoules(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    ours, theirs = multiprocessing.Pipe()
    watcher = threading.Thread(target=benchmark.watch, args=("GPU-1234", theirs))
    watcher.start()
    assert ours.recv() == "ready"

    meter = EnergyMeter([GpuEnergy(gpu)])
    rounds, began, ended, given = benchmark.run(meter, time.sleep, 1.3)
    time.sleep(0.25)
    ours.send("stop")
    steps = ours.recv()
    watcher.join()

    trace = benchmark.Trace([at for at, _ in steps], [counter / 1e3 for _, counter in steps])
    total = benchmark.row("all, and idle", 0, ended - began, given, trace.between(began, ended))
    figures = json.loads(json.dumps(benchmark.report(rounds, total, trace, "a stand-in")))
    assert figures["rounds"][0]["what"] == "1 at once"
    assert figures["joules"] == pytest.approx(figures["outside_joules"], abs=400.0)
    assert "all, and idle" in capsys.readouterr().out


def test_without_a_gpu_the_benchmark_says_so(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["energy.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main() == 1
    assert "needs a CUDA device: there is none" in capsys.readouterr().err
