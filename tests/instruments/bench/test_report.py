"""The report of `moebox bench`: its arithmetic on made-up figures, as JSON and as text."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules
from moebox.instruments.bench.cost import RunCost
from moebox.instruments.bench.decode_report import decode_report
from moebox.instruments.bench.measured_model import MeasuredModel
from moebox.instruments.bench.prefill_report import LayerWork, prefill_report
from moebox.instruments.bench.report import BenchReport
from moebox.instruments.bench.roads import LAYER_FIELDS
from moebox.instruments.bench.text import render_bench
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.machine.floor import Ceilings, PrefillFloor

K2, K2_SHALLOW = shape_config("kimi-k2"), shape_config("kimi-k2", 9)
EXPERT = K2.expert_bytes
BOX = Ceilings(ram_gbps=100, hbm_gbps=4000, pcie_gbps=50, cpu_tflops=4, gpu_tflops=700)


def sample(**columns):
    """One token's layers; what is not given is 0."""
    layers = max(len(column) for column in columns.values())
    return np.array([[columns.get(name, [0.0] * layers)[i] for name in LAYER_FIELDS] for i in range(layers)])


def k2_decode(model=None):
    """Two tokens through 8 layers: 4 hits, 1 upload of 0.5 ms, 3 on the CPU in 1 ms; 2 ms a layer."""
    token = sample(
        hits=[4] * 8,
        uploads=[1] * 8,
        cpu=[3] * 8,
        wait_s=[1.5e-3, *[0.5e-3] * 7],
        schedule_s=[10e-6] * 8,
        cpu_s=[1e-3] * 8,
        upload_s=[0.5e-3] * 8,
        layer_s=[1.5e-3] * 8,
    )
    model = model or MeasuredModel("k2", K2_SHALLOW, 60)
    energy = (Joules("gpu", 3.0, "counter"), Joules("cpu", 1.0, "estimated"))
    spent = RunCost(2, 42e-3, energy, Prices(hardware_price=26_280, life_months=10))
    return decode_report(np.stack([token, token]), [20e-3, 22e-3], model, BOX, cached_tokens=99, spent=spent)


def test_decode_report_sums_times_and_bytes_of_each_road():
    report = k2_decode()

    assert (report.tokens, report.cached_tokens) == (2, 99)
    assert report.token_s == pytest.approx(21e-3)
    assert report.tokens_per_s == pytest.approx(1 / 21e-3)
    assert report.hit_rate == 0.5
    assert report.spent.joules_per_token == 2.0
    assert report.schedule_p95_s == pytest.approx(10e-6)
    assert report.roads.hit_bytes == 8 * 4 * EXPERT
    assert report.roads.upload_bytes == 8 * EXPERT
    assert report.roads.cpu_bytes == 8 * 3 * EXPERT
    assert report.roads.cpu_gbps == pytest.approx(3 * EXPERT / 1e-3 / 1e9)
    assert report.roads.upload_gbps == pytest.approx(EXPERT / 0.5e-3 / 1e9)
    assert report.roads.cpu_of_ceiling == pytest.approx(report.roads.cpu_gbps / 100)
    assert report.roads.upload_of_ceiling == pytest.approx(report.roads.upload_gbps / 50)


def test_decode_floor_counts_backbone_hits_and_misses_of_all_layers():
    report, backbone = k2_decode(), MeasuredModel("", K2_SHALLOW, 60).backbone

    by_hand = (backbone.token(8) + 32 * EXPERT) / 4000e9 + 32 * EXPERT / 150e9

    assert report.floor.seconds == pytest.approx(by_hand)
    assert report.of_floor == pytest.approx(by_hand / 21e-3)
    in_layers = sum(layer.floor_s for layer in report.layers)
    assert in_layers + backbone.head / 4000e9 == pytest.approx(by_hand)


def test_decode_layers_have_their_own_figures():
    first, second, *_ = k2_decode().layers

    assert first.seconds == pytest.approx(3e-3)
    assert second.seconds == pytest.approx(2e-3)
    assert (second.hits, second.uploads, second.cpu) == (4, 1, 3)
    assert second.roads.cpu_bytes == 3 * EXPERT
    assert first.floor_s > second.floor_s  # the dense layer comes before it


def test_full_depth_takes_the_mean_layer_sixty_times_and_the_rest_once():
    full = k2_decode().full_depth

    assert full.layer_s == pytest.approx(2e-3)
    assert full.fixed_s == pytest.approx(21e-3 - 16e-3)
    assert full.token_s == pytest.approx(5e-3 + 120e-3)
    assert full.tokens_per_s == pytest.approx(8.0)
    backbone = MeasuredModel("", K2, 60).backbone.token(60)
    by_hand = (backbone + 240 * EXPERT) / 4000e9 + 240 * EXPERT / 150e9
    assert full.floor_s == pytest.approx(by_hand)


def test_full_depth_of_a_deep_run_is_the_run_itself():
    deep = k2_decode(MeasuredModel("k2", K2_SHALLOW, 8))

    assert deep.full_depth.token_s == pytest.approx(deep.token_s)
    assert deep.full_depth.floor_s == pytest.approx(deep.floor.seconds)


def test_uploads_that_were_not_timed_are_left_out_of_the_rate():
    known = sample(uploads=[2.0], cpu=[6.0], cpu_s=[1e-3], upload_s=[1e-3], layer_s=[2e-3])
    unknown = sample(uploads=[8.0], cpu=[0.0], upload_s=[math.nan], layer_s=[2e-3])
    one_layer = MeasuredModel("", replace(K2, num_hidden_layers=2), 1)

    report = decode_report(np.stack([known, unknown]), [1e-2] * 2, one_layer, BOX, cached_tokens=0)

    assert report.roads.upload_gbps == pytest.approx(2 * EXPERT / 1e-3 / 1e9)
    assert report.roads.upload_bytes == 5 * EXPERT
    assert report.spent is report.spent_at_full_depth is None


def test_cold_experts_count_for_the_disk_and_for_the_cpu():
    box = replace(BOX, hbm_gbps=0, pcie_gbps=0, nvme_gbps=5)
    token = sample(cpu=[6.0] * 8, cold=[2.0] * 8, cpu_s=[2e-3] * 8, read_s=[0.02] * 8, layer_s=[0.02] * 8)

    report = decode_report(token[None], [0.2], MeasuredModel("k2", K2_SHALLOW, 60), box, cached_tokens=0)

    assert (report.hit_rate, report.in_memory) == (0, 0.75)
    assert report.roads.cpu_bytes == 48 * EXPERT
    assert report.roads.read_bytes == 16 * EXPERT
    assert report.roads.read_gbps == pytest.approx(2 * EXPERT / 0.02 / 1e9)
    assert report.roads.read_of_ceiling == pytest.approx(report.roads.read_gbps / 5)
    assert report.floor.nvme_s == pytest.approx(16 * EXPERT / 5e9)
    assert report.floor.misses_s == pytest.approx(64 * EXPERT / 100e9)
    assert report.floor.seconds == report.floor.nvme_s
    assert report.full_depth.floor_s == pytest.approx(120 * EXPERT / 5e9)


def k2_prefill():
    work = LayerWork(0.2, 0, 300, 84, 0.15, math.nan, PrefillFloor(0.1, 0.1, 0.01, 84))
    return prefill_report(4096, [1.9, 1.7, 1.8], [work] * 8, MeasuredModel("", K2_SHALLOW, 60), BOX)


def test_prefill_report_is_the_median_run_and_its_extrapolation():
    report = k2_prefill()

    assert (report.runs, report.seconds) == (3, 1.8)
    assert report.tokens_per_s == pytest.approx(4096 / 1.8)
    assert report.times_floor == pytest.approx(2.0)
    assert report.full_depth_s == pytest.approx(0.2 + 60 * 0.2)
    assert report.layers[3].roads.upload_gbps == pytest.approx(300 * EXPERT / 0.15 / 1e9)
    assert report.layers[3].roads.cpu_gbps is None


def made_up_report():
    return BenchReport(
        model=MeasuredModel("kimi-k2, random", K2_SHALLOW, 60),
        machine={"cpu": "a CPU", "threads": 15, "gpu": "a GPU"},
        plan=["whole model in 74.5 GiB"],
        residents={"slots": 10, "of": 3072, "full_slots": 75, "full_of": 23040},
        routing={"source": "synthetic, seed 0", "repeat_share": 0.42},
        ceilings=BOX,
        prefill=[k2_prefill()],
        decode=k2_decode(),
        notes=["made up"],
    )


def test_report_as_json_has_every_figure_and_no_nan():
    data = json.loads(json.dumps(made_up_report().to_dict(), allow_nan=False))

    assert data["decode"]["full_depth"]["tokens_per_s"] == pytest.approx(8.0)
    assert data["decode"]["of_floor"] < 1
    assert data["decode"]["layers"][0]["roads"]["cpu_bytes"] == 3 * EXPERT
    assert data["prefill"][0]["layers"][0]["cpu_s"] is None
    assert data["prefill"][0]["times_floor"] == pytest.approx(2.0)
    assert data["ceilings"]["pcie_gbps"] == 50
    assert data["residents"]["full_slots"] == 75


def test_report_as_text_shows_the_figures_and_their_arithmetic():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    render_bench(made_up_report(), console)

    text = console.export_text()

    for part in (
        "kimi-k2, random on a GPU; a CPU, 15 threads",
        "42.0% of a token's picks repeat",
        "prompt of 4,096 tokens: 2,275.6 tok/s",
        "at 60 MoE layers: 0.200 s + 60/8 x 1.600 s = 12.200 s",
        "50.0% hits",
        "at 60 MoE layers: 5.000 ms + 60 x 2.000 ms = 125.00 ms, 8.00 tok/s",
        "cost: 2.00 J/token (GPU 1.50, CPU 0.50 est.)",
        "GB / (100.0 + 50.0) GB/s",
        "note: made up",
        "CPU MB",
    ):
        assert part in text
