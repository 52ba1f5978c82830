"""benchmarks/plan.py: RAM is filled once for all budgets; predictions beside measurements."""

import importlib.util
import json
import sys

import pytest

from helpers.paths import ROOT
from moebox.instruments.measure import ceilings

PATH = ROOT / "benchmarks" / "plan.py"
SHAPE = ("--shape", "tiny", "--layers", "2", "--device", "stand-in", "--gpu", "h200-141gb")


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("plan_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Ceilings and warm-ups that take milliseconds."""
    for name, value in {"READ_BYTES": 1 << 20, "HBM_BYTES": 1 << 20, "BESIDE_S": 1e-4, "REPEATS": 1}.items():
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setattr("moebox.instruments.bench.bench.WARMUP_TOKENS", 2)
    monkeypatch.setattr("moebox.instruments.bench.bench.PROMPT_RUNS", 1)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


@pytest.mark.slow
def test_a_shape_is_filled_once_and_planned_at_full_depth(benchmark, quick, monkeypatch, capsys):
    used, bench = [], benchmark.bench
    monkeypatch.setattr(
        benchmark, "bench", lambda plan, filled: (used.append(filled), bench(plan, None, filled))[1]
    )
    arguments = ["plan.py", *SHAPE, "--vram", "0.82GB,1GB", "--prompt", "6", "--tokens", "4", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", arguments)

    benchmark.main()

    out = capsys.readouterr().out.splitlines()
    rows = json.loads(out[-1])["rows"]
    assert used[0] is used[1]
    assert used[0].n_rows == 8  # one of two MoE layers runs
    assert [row["budget"] for row in rows] == [820_000_000, 1_000_000_000]
    assert [row["experts"] for row in rows] == [16, 16]
    assert all(row["error"] == row["predicted"]["token_ms"] / row["measured"]["token_ms"] - 1 for row in rows)
    assert all(row["measured"]["prompt_s"] > 0 for row in rows)
    assert out[0].split()[0] == "budget"
    assert "missed" in out[3]


def test_predictions_of_the_whole_k2_on_an_h200(benchmark):
    options = benchmark.parse(["--shape", "kimi-k2", "--gpu", "h200-141gb"])
    config = benchmark.shape_config("kimi-k2")
    model = benchmark.PlannedModel("kimi-k2", config)
    box = benchmark.find_box(benchmark.BoxOptions(gpu=options.gpu), config, [])
    predictor = benchmark.published_hit_predictor(config)

    plans = [
        benchmark.plan_on(model, budget, predictor) for budget in benchmark.gpu_budgets(box, config, options)
    ]
    found = [benchmark.predict(plan, 4096, options.prompt) for plan in plans]

    assert (options.layers, options.prompt, options.tokens) == (9, 4096, 128)
    assert [plan.box.vram for plan in plans] == [40e9, 80e9, 110e9, 143e9]
    assert all(plan.placement.disk_experts == 0 for plan in plans)
    assert [one.token_ms for one in found] == sorted((one.token_ms for one in found), reverse=True)
    assert [one.hits for one in found] == sorted(one.hits for one in found)
    assert found[-1].prompt_s > 0


def test_a_row_of_rounds_has_the_median_of_each_figure(benchmark):
    rows = [
        benchmark.Row(1, 2, 3, benchmark.Figures(10, 5, 0.5, said), benchmark.Figures(ms, 6, 0.6, 1.0))
        for ms, said in ((20, 1.0), (8, None), (10, 2.0))
    ]

    row = benchmark.median_row(rows)

    assert (row.measured.token_ms, row.measured.prompt_s, row.error) == (10, 1.0, 0)
    assert row.predicted.prompt_s is None
