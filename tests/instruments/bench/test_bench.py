"""`moebox bench`: whole runs on the CPU and on the stand-in device, and the command."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from helpers.paths import TINY_K2
from helpers.runtime import make_checkpoint
from moebox.cli import main_group
from moebox.config import load_config
from moebox.errors import PlanError, RequestError
from moebox.instruments.bench.bench import bench
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.prompt import prompt_text
from moebox.instruments.bench.text import render_bench
from moebox.instruments.measure import ceilings
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.device.registry import open_device
from moebox.offload.disk.store import ExpertStore
from moebox.offload.machine.drive_speed import DriveSpeed
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.routing.trace import synthetic_trace
from moebox.quantize.convert import quantize
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.cpu_runner import CpuRunner, default_dtype
from moebox.runtime.text.tokenizer import Tokenizer


@pytest.fixture
def quick(monkeypatch):
    """Ceilings and warm-ups that take milliseconds."""
    monkeypatch.setattr(ceilings, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "HBM_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "BESIDE_S", 1e-4)
    monkeypatch.setattr(ceilings, "REPEATS", 1)
    monkeypatch.setattr("moebox.instruments.bench.bench.WARMUP_TOKENS", 2)
    monkeypatch.setattr("moebox.instruments.bench.bench.PROMPT_RUNS", 1)


def quarter_of_the_experts(folder):
    """RAM, in bytes, that holds a quarter of a checkpoint's experts beside the backbone and 64 tokens."""
    config = load_config(folder)
    return budget_for_share(config, default_dtype(config, "bf16"), "bf16", 64, 0.25)


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


def test_bench_on_the_stand_in_counts_every_pick_once(quick):
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
        "moebox.instruments.bench.bench.text_ids", lambda model, vocab_size, count: [7] * count
    )
    options = BenchOptions(folder, prompt_tokens=(6,), decode_tokens=3, device=device, context=64)

    report = bench(replace(options, routing=str(tmp_path / "trace.npz")))

    assert report.routing["source"] == "synthetic, seed 5"
    assert report.model.full_moe_layers == report.model.moe_layers == 2
    assert report.decode.tokens == 3
    assert bench(options).routing == {"source": "the model's router"}


def test_bench_with_experts_on_disk(quick, tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=32)
    monkeypatch.setattr(
        "moebox.instruments.bench.bench.text_ids", lambda model, vocab_size, count: list(range(count))
    )
    monkeypatch.setattr(ExpertStore, "measure_depth", lambda store: {"a drive": DriveSpeed({4: 2.5}, True)})
    ram = quarter_of_the_experts(folder)
    options = BenchOptions(folder, prompt_tokens=(20,), decode_tokens=6, device="cpu", context=64, ram=ram)

    report = bench(replace(options, prefetch=False))

    assert report.residents["rows"] < 64
    assert report.ceilings.nvme_gbps == 2.5
    assert all(layer.cpu + layer.cold == 4 for layer in report.decode.layers)
    assert 0 < report.decode.in_memory < 1
    assert report.decode.roads.read_gbps > 0
    prompt = report.prefill[0]
    assert all(layer.cold > 0 for layer in prompt.layers)
    read_s = [layer.cold * report.model.config.expert_bytes / 2.5e9 for layer in prompt.layers]
    assert all(layer.floor.seconds >= s for layer, s in zip(prompt.layers, read_s, strict=True))
    assert report.plan[0].startswith("RAM: backbone")
    assert bench(replace(options, ram=None)).decode.in_memory == 1


def test_bench_reports_prefetched_reads(quick, tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "model", n_routed_experts=32)
    monkeypatch.setattr(
        "moebox.instruments.bench.bench.text_ids", lambda model, vocab_size, count: list(range(count))
    )
    monkeypatch.setattr(ExpertStore, "measure_depth", lambda store: {"a drive": DriveSpeed({4: 2.5}, True)})
    monkeypatch.setattr(
        "moebox.offload.prefetch.ab_trial.FIRST_SHARE", 1e6
    )  # a trial takes more tokens than the test decodes
    ram = quarter_of_the_experts(folder)
    options = BenchOptions(folder, prompt_tokens=(20,), decode_tokens=6, device="cpu", context=64, ram=ram)

    report = bench(options)

    prefetch = report.prefetch
    assert prefetch.issued == prefetch.used + prefetch.late + prefetch.wrong > 0
    assert report.to_dict()["prefetch"]["recall"] == prefetch.recall
    console = Console(file=io.StringIO())
    render_bench(report, console)
    assert f"prefetch: {prefetch.issued} reads ahead, {prefetch.used} used" in console.file.getvalue()
    assert bench(replace(options, prefetch=False)).prefetch is None


@pytest.mark.slow
def test_bench_of_a_checkpoint_decodes_behind_the_fixed_text(quick, monkeypatch, tmp_path):
    given, forward = [], CpuRunner.forward

    def noted(runner, token_ids, cache, **options):
        given.extend(token_ids)
        return forward(runner, token_ids, cache, **options)

    quantize(TINY_K2, tmp_path / "model")
    monkeypatch.setattr(CpuRunner, "forward", noted)

    bench(BenchOptions(tmp_path / "model", prompt_tokens=(40,), decode_tokens=0, device="cpu", context=64))

    tokenizer = Tokenizer.load(TINY_K2, load_config(TINY_K2).vocab_size)
    assert prompt_text().startswith(tokenizer.decode(given))
    assert len(given) == 40


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
