"""Energy and cost of a benchmark's run: by hand, as text, as JSON, and of a real run."""

import json

import pytest

from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules
from moebox.instruments.bench.bench import bench
from moebox.instruments.bench.cost import RunCost
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.measure import ceilings

ENERGY = (Joules("gpu", 3.0, "counter"), Joules("cpu", 1.0, "estimated"))


def test_joules_and_price_of_a_token_by_hand():
    """2 J a token at 0.36 a kWh, which is 3.6 MJ, are 0.2 for a million tokens. A price of 26,280 over 10
    months is 0.001 a second, so that 42 ms for 2 tokens are 21 for a million."""
    spent = RunCost(2, 42e-3, ENERGY, Prices(electricity_per_kwh=0.36, hardware_price=26_280, life_months=10))

    assert spent.joules_per_token == 2.0
    assert spent.cost.electricity == pytest.approx(0.2)
    assert spent.cost.hardware == pytest.approx(21.0)
    assert str(spent) == "2.00 J/token (GPU 1.50, CPU 0.50 est.) · $21.20/1M tokens at full use"


def test_a_deeper_model_draws_the_same_watts_for_longer():
    spent = RunCost(2, 42e-3, ENERGY, Prices(electricity_per_kwh=0.36)).times(5)

    assert [part.joules for part in spent.energy] == [15.0, 5.0]
    assert str(spent) == "10.0 J/token (GPU 7.50, CPU 2.50 est.) · $1.00/1M tokens, electricity only"


def test_a_run_reports_energy_and_cost(monkeypatch, tmp_path):
    for name, value in (("READ_BYTES", 1 << 20), ("REPEATS", 1), ("BESIDE_S", 1e-4)):
        monkeypatch.setattr(ceilings, name, value)
    monkeypatch.setenv("MOEBOX_LEDGER", str(tmp_path / "ledger"))
    options = BenchOptions(shape="tiny", device="cpu", prompt_tokens=(4,), decode_tokens=3, threads=1)
    data = json.loads(json.dumps(bench(options).to_dict(), allow_nan=False))

    for part in (data["decode"], data["prefill"][0], data["decode"]["full_depth"]):
        energy = part["energy"]
        assert energy["joules_per_token"] > 0
        assert {one["source"] for one in energy["sources"]} >= {"cpu", "dram"}
        assert part["cost"]["electricity"] == pytest.approx(energy["joules_per_token"] / 3.6 * 0.176)
        assert part["cost"]["hardware"] == 0
    assert not (tmp_path / "ledger").exists()
