"""What a plan measures of this box: a small model of the same widths, and layers that miss experts."""

import math
import time
from dataclasses import replace

import pytest

from helpers.runtime import make_checkpoint
from moebox.config import load_config
from moebox.errors import CheckpointError
from moebox.kernels import cpu
from moebox.offload.checkpoint import Checkpoint
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.floor import Ceilings
from moebox.offload.store import ExpertStore
from moebox.quantize.convert import quantize
from moebox.quantize.synth import synth
from moebox.runtime import plan_probe
from moebox.runtime.backbone import planned_bytes
from moebox.runtime.plan_probe import cold_reads, probe_cpu, probe_disk, small_config
from moebox.runtime.plan_speed import CPU_BOX, Chances, Speeds
from moebox.runtime.runner import default_dtype
from moebox.runtime.synthetic import shape_config

CEILINGS = Ceilings(ram_gbps=10.0, cpu_tflops=0.1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plan_probe, "DECODE_S", 0.01)
    monkeypatch.setattr(plan_probe, "COLD_S", 0.01)


def test_the_small_model_has_the_large_ones_widths_and_fits_a_laptop():
    config = shape_config("kimi-k2")
    small = small_config(config)

    assert small.expert_bytes == config.expert_bytes
    for field in ("hidden_size", "num_attention_heads", "kv_lora_rank", "num_experts_per_tok"):
        assert getattr(small, field) == getattr(config, field)
    assert len(small.moe_layers) == plan_probe.MOE_LAYERS
    dtype = default_dtype(small, "bf16")
    assert small.experts_bytes + planned_bytes(small.backbone_shapes(), dtype, "bf16") < 2.5e9


def test_a_model_that_is_small_is_measured_as_it_is():
    config = shape_config("tiny")

    assert small_config(config) is config


@pytest.mark.parametrize("head_s", [1e-6, 1.0])
def test_the_parts_add_up_to_what_was_measured(monkeypatch, head_s):
    """However fast the head is: what bytes do not explain is a layer's own."""
    few = {"token_s": 0.060, "wait_s": 0.004, "cpu_s": 0.003}
    many = few | {"wait_s": 0.005}
    monkeypatch.setattr(plan_probe._Probe, "_decode", lambda _, cached: few if cached < 100 else many)
    monkeypatch.setattr(plan_probe, "_fastest", lambda _: head_s)
    config = shape_config("tiny")

    reached = probe_cpu(config, CEILINGS)

    item_bytes = default_dtype(config, "bf16").itemsize
    token = Speeds(config, CEILINGS, reached, item_bytes).decode(Chances(0, 1, 0))
    layers = len(config.moe_layers)
    assert token.experts_s == pytest.approx(layers * few["cpu_s"])
    assert token.seconds == pytest.approx(few["token_s"], rel=0.05)
    later = Speeds(config, CEILINGS, reached, item_bytes).decode(Chances(0, 1, 0), plan_probe.MANY_CACHED)
    per_layer_s = (later.seconds - token.seconds) / config.num_hidden_layers
    assert per_layer_s == pytest.approx(many["wait_s"] - few["wait_s"], rel=0.05)


def test_a_real_probe_gives_figures_that_can_be_kept():
    figures = probe_cpu(shape_config("tiny"), CEILINGS).figures()

    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert figures["backbone"] > 0 < figures["experts"]


def test_reading_from_the_disk_is_measured_on_the_checkpoint_itself(tmp_path):
    synth(tmp_path / "source", "tiny")
    quantize(tmp_path / "source", tmp_path / "model")

    cold = probe_disk(tmp_path / "model")

    assert cold.latency_s >= 0
    assert 0 < cold.gbps < 1e6


def test_what_is_computed_beside_a_read_is_no_part_of_it():
    """Of a drive that takes 2 ms to answer and 15 ms an expert, beside a CPU that takes 5."""
    config = shape_config("kimi-k2")
    cold = cold_reads(config, all_s=0.002 + 8 * 0.015 + 0.005, alone_s=0.002 + 0.015 + 0.005, there_s=0.005)

    assert cold.latency_s == pytest.approx(0.002)
    assert config.expert_bytes / cold.gbps / 1e9 == pytest.approx(0.015)
    busy = cold_reads(config, all_s=0.1, alone_s=0.2, there_s=0.3)
    assert busy.latency_s == 0
    assert config.expert_bytes / busy.gbps / 1e9 == pytest.approx(0.1 / 16)


@pytest.mark.parametrize("experts", [9, 40])
def test_the_picks_of_the_probe_are_missing_or_there_as_they_should_be(tmp_path, monkeypatch, experts):
    monkeypatch.setattr(plan_probe, "COLD_S", 0.0)
    monkeypatch.setattr(plan_probe, "COLD_LAYERS", 20)
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=experts)
    seen, forward = [], CpuExperts.forward
    monkeypatch.setattr(
        CpuExperts, "forward", lambda *given: (forward(*given), seen.append(vars(given[0].last).copy()))[0]
    )

    probe_disk(folder)

    assert [(layer["hits"], layer["cold"]) for layer in seen] == [(0, 4), (0, 1), (1, 0)] * 20


READ_S, COMPUTE_S = 0.03, 0.01


@pytest.fixture
def slow_box(tmp_path, monkeypatch):
    """A checkpoint whose experts take `READ_S` to read, one by one, and `COMPUTE_S` to compute."""
    sizes = {"n_routed_experts": 32, "moe_intermediate_size": 1280}
    synth(tmp_path / "source", "tiny", config_overrides=sizes)
    quantize(tmp_path / "source", tmp_path / "model")
    compute, open_store = cpu.experts_forward, ExpertStore.open

    def slow_open(checkpoint):
        store = open_store(checkpoint, depth=1)
        store.reader.inject("", "delay", round(READ_S * 1e6))
        return store

    def slow_compute(pool, experts, *arguments):
        time.sleep(COMPUTE_S * len(experts))
        compute(pool, experts, *arguments)

    monkeypatch.setattr(ExpertStore, "open", slow_open)
    monkeypatch.setattr(cpu, "experts_forward", slow_compute)
    return tmp_path / "model"


def test_a_layer_takes_what_the_plan_says_however_many_experts_are_missing(slow_box):
    config, checkpoint = load_config(slow_box), Checkpoint.open(slow_box)
    k, nbytes = config.num_experts_per_tok, config.expert_bytes
    ceilings = Ceilings(ram_gbps=nbytes / COMPUTE_S / 1e9, nvme_gbps=nbytes / READ_S / 1e9)
    speeds = Speeds(config, ceilings, replace(CPU_BOX, experts=1.0, nvme=1.0, read_s=0.0))

    with ExpertStore.open(checkpoint) as store:
        experts = CpuExperts.load(config, store, cpu.ThreadPool(1), 16)
        for missing in range(k + 1):
            _, planned_s = speeds._layer_with(missing, k - missing, Chances(0, 0.5, 0.5))
            fastest_s = min(_layer_with(experts, missing) for _ in range(5))
            assert planned_s == pytest.approx(fastest_s, rel=0.2), missing


def _layer_with(experts, missing: int) -> float:
    """Seconds of a layer of which so many picks are on the disk."""
    resident = [experts.cache.resident(key) for key in range(experts.config.n_routed_experts)]
    order = sorted(range(len(resident)), key=lambda key: resident[key])
    ids = order[:missing] + order[len(order) - experts.config.num_experts_per_tok + missing :]
    seconds = plan_probe._layer(experts, 0, ids)
    assert experts.last.cold == missing
    return seconds


def test_a_folder_whose_experts_are_not_int4_cannot_be_measured(tmp_path):
    synth(tmp_path / "source", "tiny")

    with pytest.raises(CheckpointError, match="not quantized"):
        probe_disk(tmp_path / "source")
