"""`moebox bench`: the report's arithmetic on made-up figures, budgets scaled with the depth, whole runs."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from helpers.runtime import make_checkpoint
from moebox.cli import main_group
from moebox.config import load_config
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules
from moebox.errors import PlanError, RequestError
from moebox.instruments.bench import rigs as bench_rigs
from moebox.instruments.bench.bench import bench
from moebox.instruments.bench.cost import Spent
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.report import (
    LAYER_FIELDS,
    BenchReport,
    LayerWork,
    Subject,
    decode_report,
    prefill_report,
)
from moebox.instruments.bench.rigs import scale_budgets
from moebox.instruments.bench.text import render_bench
from moebox.instruments.measure import ceilings
from moebox.instruments.measure.random_model import experts_in_ram, shape_config, synthetic_model
from moebox.kernels import cpu
from moebox.offload.device.registry import open_device
from moebox.offload.disk.store import ExpertStore
from moebox.offload.machine.drive_speed import DriveSpeed
from moebox.offload.machine.floor import Ceilings, PrefillFloor
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.routing.trace import synthetic_trace
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.cpu_runner import default_dtype

K2, K2_SHALLOW = shape_config("kimi-k2"), shape_config("kimi-k2", 9)
EXPERT = K2.expert_bytes
BOX = Ceilings(ram_gbps=100, hbm_gbps=4000, pcie_gbps=50, cpu_tflops=4, gpu_tflops=700)
GIB = 1 << 30


@pytest.fixture
def quick(monkeypatch):
    """Ceilings and warm-ups that take milliseconds."""
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "HBM_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "BESIDE_S", 1e-4)
    monkeypatch.setattr(ceilings, "REPEATS", 1)
    monkeypatch.setattr("moebox.instruments.bench.bench.WARMUP_TOKENS", 2)
    monkeypatch.setattr("moebox.instruments.bench.bench.PROMPT_RUNS", 1)


def sample(**columns):
    """One token's layers; what is not given is 0."""
    layers = max(len(column) for column in columns.values())
    return np.array([[columns.get(name, [0.0] * layers)[i] for name in LAYER_FIELDS] for i in range(layers)])


def k2_decode(subject=None):
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
    subject = subject or Subject("k2", K2_SHALLOW, 60)
    energy = (Joules("gpu", 3.0, "counter"), Joules("cpu", 1.0, "estimated"))
    spent = Spent(2, 42e-3, energy, Prices(hardware_price=26_280, life_months=10))
    return decode_report(
        np.stack([token, token]), [20e-3, 22e-3], subject, BOX, cached_tokens=99, spent=spent
    )


def test_decode_report_adds_up_times_bytes_and_roads():
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
    report, backbone = k2_decode(), Subject("", K2_SHALLOW, 60).backbone

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
    backbone = Subject("", K2, 60).backbone.token(60)
    by_hand = (backbone + 240 * EXPERT) / 4000e9 + 240 * EXPERT / 150e9
    assert full.floor_s == pytest.approx(by_hand)


def test_full_depth_of_a_deep_run_is_the_run_itself():
    deep = k2_decode(Subject("k2", K2_SHALLOW, 8))

    assert deep.full_depth.token_s == pytest.approx(deep.token_s)
    assert deep.full_depth.floor_s == pytest.approx(deep.floor.seconds)


def test_uploads_that_were_not_timed_are_left_out_of_the_rate():
    known = sample(uploads=[2.0], cpu=[6.0], cpu_s=[1e-3], upload_s=[1e-3], layer_s=[2e-3])
    unknown = sample(uploads=[8.0], cpu=[0.0], upload_s=[math.nan], layer_s=[2e-3])
    one_layer = Subject("", replace(K2, num_hidden_layers=2), 1)

    report = decode_report(np.stack([known, unknown]), [1e-2] * 2, one_layer, BOX, cached_tokens=0)

    assert report.roads.upload_gbps == pytest.approx(2 * EXPERT / 1e-3 / 1e9)
    assert report.roads.upload_bytes == 5 * EXPERT
    assert report.spent is report.spent_at_full_depth is None


def test_cold_experts_pass_the_disk_and_then_the_cpu():
    box = replace(BOX, hbm_gbps=0, pcie_gbps=0, nvme_gbps=5)
    token = sample(cpu=[6.0] * 8, cold=[2.0] * 8, cpu_s=[2e-3] * 8, read_s=[0.02] * 8, layer_s=[0.02] * 8)

    report = decode_report(token[None], [0.2], Subject("k2", K2_SHALLOW, 60), box, cached_tokens=0)

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
    return prefill_report(4096, [1.9, 1.7, 1.8], [work] * 8, Subject("", K2_SHALLOW, 60), BOX)


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
        subject=Subject("kimi-k2, random", K2_SHALLOW, 60),
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


def test_report_as_text_shows_the_figures_and_how_they_come_about():
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


def share_of(options, free_vram=139 * GIB, free_ram=120 * GIB):
    return scale_budgets(K2_SHALLOW, K2, options, free_vram, free_ram)


def test_budget_of_an_80_gb_card_is_scaled_to_the_depth():
    share = share_of(BenchOptions(vram=80_000_000_000, context=8192))

    assert 0.07 < share.full_slots / 23040 < 0.12
    assert share.slots - 8 == math.ceil((share.full_slots - 8) * 8 / 60)  # 8 are free for uploads
    assert (share.rows, share.exclusive) == (3072, False)
    assert "8 of 60 MoE layers" in share.lines[-1]
    assert f"{share.full_slots - 8:,} of 23,040 experts" in share.lines[1]


def test_budget_may_be_that_of_a_larger_card():
    small = share_of(BenchOptions(vram=80_000_000_000, context=8192), free_vram=40 * GIB)

    assert small == share_of(BenchOptions(vram=80_000_000_000, context=8192))


def test_no_budget_keeps_no_expert_on_the_gpu():
    assert share_of(BenchOptions(vram=0)).slots == 0


def test_ram_too_small_for_all_experts_makes_the_tiers_exclusive():
    share = share_of(BenchOptions(vram=130 * GIB, ram=500 * GIB, context=4096))

    assert share.exclusive
    assert share.rows < 3072 < share.rows + share.slots


def test_run_that_does_not_fit_the_machine_is_refused():
    with pytest.raises(PlanError, match=r"3,072 experts take 70\.\d GiB of RAM, 57\.0 GiB are free"):
        share_of(BenchOptions(), free_ram=60 * GIB)


def test_budgets_that_do_not_hold_all_random_experts_are_refused_before_memory_is_taken():
    with pytest.raises(PlanError, match=r"hold [\d,]+ of 3,072 random experts.*\n.*moebox synth"):
        share_of(BenchOptions(vram=80 * GIB, ram=300 * GIB, context=4096))


def test_whole_model_that_does_not_fit_the_budget_is_refused():
    with pytest.raises(PlanError, match="before the first expert"):
        share_of(BenchOptions(vram=10 * GIB))


def test_synthetic_model_has_the_shapes_of_a_loaded_one_and_repeats_by_seed():
    config = shape_config("tiny")
    one, again = (dict(synthetic_model(config, torch.bfloat16).named_parameters()) for _ in range(2))
    other = dict(synthetic_model(config, torch.bfloat16, seed=1).named_parameters())

    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].dtype == torch.bfloat16
    assert one["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert one["model.norm.weight"].eq(1).all()
    assert one["model.layers.0.mlp.down_proj.weight"].float().std() == pytest.approx(224**-0.5, rel=0.1)


def test_experts_in_ram_are_the_rows_of_the_slab():
    config = shape_config("tiny")
    ram = RamSlab(config)
    ram.fill_synthetic(seed=3)
    pool = cpu.ThreadPool(1)
    hidden = torch.randn(1, config.hidden_size).bfloat16()
    ids, weights = torch.tensor([[5]]), torch.ones(1, 1)

    routed = experts_in_ram(ram, pool).forward(2, ids, weights, hidden)

    direct = torch.zeros(1, config.hidden_size)
    expert = ram.expert(int(ram.rows[config.n_routed_experts + 5]))
    offsets, tokens = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cpu.experts_forward(pool, [expert], offsets, tokens, torch.ones(1), hidden, direct)
    assert torch.equal(routed, direct)


TINY = BenchOptions(shape="tiny", prompt_tokens=(6, 9), decode_tokens=5)


def test_bench_on_the_cpu_sees_every_expert_of_the_trace(quick):
    report = bench(replace(TINY, device="cpu"))
    trace = synthetic_trace(9 + 5 + 2, 2, 8, 4)

    assert [prompt.tokens for prompt in report.prefill] == [6, 9]
    picked = trace.ids[(np.arange(9) + 9) % trace.tokens, 1]  # the first measured run comes second
    assert report.prefill[1].layers[1].cpu == len(np.unique(picked))
    assert report.decode.cached_tokens == 9 + 2
    assert [layer.cpu for layer in report.decode.layers] == [4, 4]
    assert report.decode.hit_rate == 0
    assert report.decode.roads.upload_gbps is None
    assert sum(layer.seconds for layer in report.decode.layers) <= report.decode.token_s
    assert report.ceilings.ram_gbps > 0
    assert not report.ceilings.has_gpu


def test_bench_on_the_stand_in_sends_every_pick_down_one_road(quick):
    report = bench(replace(TINY, device="stand-in"))

    for layer in report.decode.layers:
        assert layer.hits + layer.uploads + layer.cpu == pytest.approx(4)
    for prompt in report.prefill:
        assert all(0 < layer.hits + layer.uploads + layer.cpu <= 8 for layer in prompt.layers)
        assert all(layer.seconds > 0 < layer.floor.seconds for layer in prompt.layers)
    assert report.decode.hit_rate > 0.3
    assert report.ceilings.has_gpu
    assert report.residents["slots"] >= 16


def test_bench_on_rows_that_were_filled_before(quick):
    device = open_device("stand-in")
    ram = RamSlab(shape_config("tiny"), device=device)
    ram.fill_synthetic()
    bytes_before = ram.slab.clone()

    budgets = [bench(replace(TINY, device="stand-in", vram=vram), filled=ram) for vram in (0, None)]

    assert [report.decode.hit_rate > 0.3 for report in budgets] == [False, True]
    assert torch.equal(ram.slab, bytes_before)
    with pytest.raises(PlanError, match="RAM holds them all"):
        bench(replace(TINY, device="stand-in", ram=8 * ram.stride), filled=ram)


def test_bench_without_slots_has_no_hits(quick):
    report = bench(replace(TINY, device="stand-in", vram=0, prompt_tokens=(6,)))

    assert report.residents["slots"] == 0
    assert report.decode.hit_rate == 0
    assert all(layer.hits == 0 for layer in report.prefill[0].layers)


@pytest.mark.parametrize("device", ["cpu", "stand-in"])
def test_bench_of_a_checkpoint_with_a_recorded_trace(quick, tmp_path, monkeypatch, device):
    folder = make_checkpoint(tmp_path / "model")
    synthetic_trace(30, 2, 8, 4, seed=5).save(tmp_path / "trace.npz")
    monkeypatch.setattr(
        "moebox.instruments.bench.bench._prompt_ids", lambda options, config, count: [7] * count
    )
    options = BenchOptions(folder, prompt_tokens=(6,), decode_tokens=3, device=device, context=64)

    report = bench(replace(options, routing=str(tmp_path / "trace.npz")))

    assert report.routing["source"] == "synthetic, seed 5"
    assert report.subject.full_moe_layers == report.subject.moe_layers == 2
    assert report.decode.tokens == 3
    assert bench(options).routing == {"source": "the model's router"}


def test_bench_with_experts_on_disk(quick, tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=32)
    monkeypatch.setattr(
        "moebox.instruments.bench.bench._prompt_ids", lambda options, config, count: list(range(count))
    )
    monkeypatch.setattr(ExpertStore, "measure_depth", lambda store: {"a drive": DriveSpeed({4: 2.5}, True)})
    config = load_config(folder)
    ram = budget_for_share(config, default_dtype(config, "bf16"), "bf16", 64, 0.25)
    options = BenchOptions(folder, prompt_tokens=(20,), decode_tokens=6, device="cpu", context=64, ram=ram)

    report = bench(replace(options, prefetch=False))

    assert report.residents["rows"] < 64
    assert report.ceilings.nvme_gbps == 2.5
    assert all(layer.cpu + layer.cold == 4 for layer in report.decode.layers)
    assert 0 < report.decode.in_memory < 1
    assert report.decode.roads.read_gbps > 0
    prompt = report.prefill[0]
    assert all(layer.cold > 0 for layer in prompt.layers)
    read_s = [layer.cold * report.subject.config.expert_bytes / 2.5e9 for layer in prompt.layers]
    assert all(layer.floor.seconds >= s for layer, s in zip(prompt.layers, read_s, strict=True))
    assert report.plan[0].startswith("RAM: backbone")
    assert bench(replace(options, ram=None)).decode.in_memory == 1


def test_bench_says_what_was_read_ahead(quick, tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=32)
    monkeypatch.setattr(
        "moebox.instruments.bench.bench._prompt_ids", lambda options, config, count: list(range(count))
    )
    monkeypatch.setattr(ExpertStore, "measure_depth", lambda store: {"a drive": DriveSpeed({4: 2.5}, True)})
    monkeypatch.setattr(
        "moebox.offload.prefetch.ab_trial.FIRST_SHARE", 1e6
    )  # so few tokens have no time for trials
    config = load_config(folder)
    ram = budget_for_share(config, default_dtype(config, "bf16"), "bf16", 64, 0.25)
    options = BenchOptions(folder, prompt_tokens=(20,), decode_tokens=6, device="cpu", context=64, ram=ram)

    report = bench(options)

    prefetch = report.prefetch
    assert prefetch.issued == prefetch.used + prefetch.late + prefetch.wrong > 0
    assert report.to_dict()["prefetch"]["recall"] == prefetch.recall
    console = Console(file=io.StringIO())
    render_bench(report, console)
    assert f"prefetch: {prefetch.issued} reads ahead, {prefetch.used} used" in console.file.getvalue()
    assert bench(replace(options, prefetch=False)).prefetch is None


def test_random_experts_are_in_ram_only(quick):
    with pytest.raises(PlanError, match=r"lie nowhere else\n.*moebox synth"):
        bench(replace(TINY, device="cpu", ram=1000))


def test_trace_must_fit_model_and_length(quick, tmp_path):
    path = tmp_path / "trace.npz"
    synthetic_trace(10, 2, 8, 4).save(path)

    with pytest.raises(RequestError, match="10 tokens, the benchmark needs 16"):
        bench(replace(TINY, device="cpu", routing=str(path)))


def test_more_tokens_than_the_context_are_refused(quick):
    with pytest.raises(RequestError, match="take 16 tokens; model and memory allow 15"):
        bench(replace(TINY, device="cpu", context=15))


def test_vram_for_the_cpu_is_refused(quick):
    with pytest.raises(PlanError, match="the CPU computes"):
        bench(replace(TINY, device="cpu", vram=1 << 30))


def test_command_prints_one_json_object(quick):
    shape = ["--shape", "tiny", "--device", "cpu"]
    arguments = ["bench", *shape, "--prompt-tokens", "4", "--decode-tokens", "2"]

    result = CliRunner().invoke(main_group, [*arguments, "--json"], catch_exceptions=False)

    data = json.loads(result.stdout)
    assert data["decode"]["tokens"] == 2
    assert [prompt["tokens"] for prompt in data["prefill"]] == [4]
    text = CliRunner().invoke(main_group, arguments, catch_exceptions=False).stdout
    assert "decode of 2 tokens behind 6" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint's folder or --shape"),
        (["somewhere", "--shape", "tiny"], "give a checkpoint's folder or --shape"),
        (["--shape", "tiny", "--prompt-tokens", "512,1"], "'512,1' is not a list of lengths"),
        (["--shape", "tiny", "--prompt-tokens", "many"], "'many' is not a list of lengths"),
    ],
)
def test_command_refuses_wrong_usage(arguments, message):
    result = CliRunner().invoke(main_group, ["bench", *arguments])

    assert result.exit_code == 2
    assert message in result.stderr


def test_layers_are_for_random_models_only(tmp_path):
    with pytest.raises(RequestError, match="MODEL together with"):
        bench(BenchOptions(tmp_path, layers=3))


def test_threads_leave_a_core_to_feed_the_gpu():
    cores = cpu.allowed_cpus()

    assert bench_rigs.make_pool(BenchOptions(), None).threads == cores
    assert bench_rigs.make_pool(BenchOptions(threads=1), None).threads == 1
    assert bench_rigs.make_pool(BenchOptions(), object()).threads == max(1, cores - 1)
