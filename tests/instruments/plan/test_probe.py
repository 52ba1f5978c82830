"""Measurements of this box for a plan: a small model of the same widths, and layers with cold experts."""

import math
from dataclasses import replace

import pytest

from helpers.runtime import make_checkpoint
from moebox.errors import CheckpointError
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan import probe as plan_probe
from moebox.instruments.plan.probe import (
    ColdSeconds,
    CpuProbe,
    TokenSeconds,
    cold_reads,
    layer_seconds,
    probe_cpu,
    probe_disk,
    small_config,
)
from moebox.instruments.plan.speed import CPU_BOX, PickShares, SpeedModel
from moebox.kernels import cpu
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.machine.floor import Ceilings
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.cpu_runner import default_dtype
from moebox.runtime.model.precision import planned_bytes

CEILINGS = Ceilings(ram_gbps=10.0, cpu_tflops=0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plan_probe, "DECODE_S", 0.01)
    monkeypatch.setattr(plan_probe, "COLD_S", 0.01)


def test_the_small_model_has_the_widths_of_the_large_one_and_takes_little_memory():
    config = shape_config("kimi-k2")
    small = small_config(config)

    assert small.expert_bytes == config.expert_bytes
    for field in ("hidden_size", "num_attention_heads", "kv_lora_rank", "num_experts_per_tok"):
        assert getattr(small, field) == getattr(config, field)
    assert len(small.moe_layers) == plan_probe.MOE_LAYERS
    dtype = default_dtype(small, "bf16")
    assert small.experts_bytes + planned_bytes(small.backbone_shapes(), dtype, "bf16") < 2.5e9


def test_a_small_model_is_measured_itself():
    config = shape_config("tiny")

    assert small_config(config) is config


@pytest.mark.parametrize("head_s", [1e-6, 1.0])
def test_the_parts_add_up_to_what_was_measured(monkeypatch, head_s):
    """However fast the head is: the time that bytes do not explain is `layer_s`."""
    few = TokenSeconds(token_s=0.060, experts_s=0.003, other_s=0.004)
    many = replace(few, other_s=0.005)
    monkeypatch.setattr(CpuProbe, "decode_seconds", lambda _, cached: few if cached < 100 else many)
    monkeypatch.setattr(CpuProbe, "head_seconds", lambda _: head_s)
    config = shape_config("tiny")

    reached = probe_cpu(config, CEILINGS)

    item_bytes = default_dtype(config, "bf16").itemsize
    token = SpeedModel(config, CEILINGS, reached, item_bytes).decode(PickShares(0, 1, 0))
    layers = len(config.moe_layers)
    assert token.experts_s == pytest.approx(layers * few.experts_s)
    assert token.seconds == pytest.approx(few.token_s, rel=0.05)
    later = SpeedModel(config, CEILINGS, reached, item_bytes).decode(
        PickShares(0, 1, 0), plan_probe.MANY_CACHED
    )
    per_layer_s = (later.seconds - token.seconds) / config.num_hidden_layers
    assert per_layer_s == pytest.approx(many.other_s - few.other_s, rel=0.05)


def test_figures_of_a_real_probe_are_finite():
    figures = probe_cpu(shape_config("tiny"), CEILINGS).figures()

    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert figures["backbone"] > 0 < figures["experts"]


def test_reads_are_measured_on_the_checkpoint_itself(tmp_path):
    synth(tmp_path / "source", "tiny")
    quantize(tmp_path / "source", tmp_path / "model")

    cold = probe_disk(tmp_path / "model")

    assert cold.latency_s >= 0
    assert 0 < cold.gbps < 1e6


def test_a_reads_time_does_not_include_the_computing_beside_it():
    """A drive has a latency of 2 ms and reads an expert in 15 ms; the CPU computes one in 5 ms."""
    config = shape_config("kimi-k2")
    cold = cold_reads(config, ColdSeconds(0.002 + 8 * 0.015 + 0.005, 0.002 + 0.015 + 0.005, 0.005))

    assert cold.latency_s == pytest.approx(0.002)
    assert config.expert_bytes / cold.gbps / 1e9 == pytest.approx(0.015)
    busy = cold_reads(config, ColdSeconds(0.1, 0.2, 0.3))
    assert busy.latency_s == 0
    assert config.expert_bytes / busy.gbps / 1e9 == pytest.approx(0.1 / 16)


@pytest.mark.parametrize("experts", [9, 40])
def test_layers_of_the_probe_have_the_cold_picks_that_they_should(tmp_path, monkeypatch, experts):
    monkeypatch.setattr(plan_probe, "COLD_S", 0.0)
    monkeypatch.setattr(plan_probe, "COLD_LAYERS", 20)
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=experts)
    seen, forward = [], CpuExperts.forward
    monkeypatch.setattr(
        CpuExperts, "forward", lambda *given: (forward(*given), seen.append(vars(given[0].last).copy()))[0]
    )

    probe_disk(folder)

    assert [(layer["hits"], layer["cold"]) for layer in seen] == [(0, 4), (0, 1), (1, 0)] * 20


class ClockedDrive:
    """A store whose drive reads one expert after the other, each in `read_s`, by a clock of its own."""

    def __init__(self, read_s: float) -> None:
        self.read_s, self.now_s, self._free_s = read_s, 0.0, 0.0
        self._ends: dict[int, float] = {}

    def in_order(self, keys):
        return list(keys)

    def read(self, key, row):
        """Before the clock begins."""

    def submit(self, key, row, *, prefetch=False):
        self._free_s = max(self._free_s, self.now_s) + self.read_s
        self._ends[key] = self._free_s
        return key

    def ready(self, ticket):
        return self._ends[ticket] <= self.now_s

    def wait(self, ticket):
        self.now_s = max(self.now_s, self._ends.pop(ticket))


@pytest.mark.parametrize("read_s", [0.002, 0.005, 0.015, 0.1])
def test_a_layer_takes_the_planned_time_with_any_number_of_cold_picks(monkeypatch, read_s):
    config, compute_s = replace(shape_config("tiny"), n_routed_experts=32), 0.005
    k, nbytes = config.num_experts_per_tok, config.expert_bytes
    ceilings = Ceilings(ram_gbps=nbytes / compute_s / 1e9, nvme_gbps=nbytes / read_s / 1e9)
    speeds = SpeedModel(config, ceilings, replace(CPU_BOX, experts=1.0, nvme=1.0, read_s=0.0))
    drive = ClockedDrive(read_s)

    def compute(pool, experts, *_):
        drive.now_s += compute_s * len(experts)

    monkeypatch.setattr(cpu, "experts_forward", compute)
    experts = CpuExperts.load(config, drive, cpu.ThreadPool(1), 16)

    for missing in [*range(k + 1), *range(k, -1, -1)]:
        planned_s = speeds.layer_time(missing, PickShares(0, 0.5, 0.5)).seconds
        assert planned_s == pytest.approx(layer_time(experts, drive, missing), rel=0.2), missing


def layer_time(experts, drive: ClockedDrive, missing: int) -> float:
    """Seconds of a layer of which `missing` picks are on the disk."""
    resident = [experts.cache.in_ram(key) for key in range(experts.config.n_routed_experts)]
    order = sorted(range(len(resident)), key=lambda key: resident[key])
    ids = order[:missing] + order[len(order) - experts.config.num_experts_per_tok + missing :]
    began_s = drive.now_s
    layer_seconds(experts, 0, ids)
    assert experts.last.cold == missing
    return drive.now_s - began_s


def test_a_folder_whose_experts_are_not_int4_cannot_be_measured(tmp_path):
    synth(tmp_path / "source", "tiny")

    with pytest.raises(CheckpointError, match="not quantized"):
        probe_disk(tmp_path / "source")
