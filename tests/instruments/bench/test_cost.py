"""What a benchmark's run used and cost: by hand, as text, as JSON, and of a real run."""

import json

import pytest

from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules
from moebox.instruments.bench.bench import bench
from moebox.instruments.bench.cost import Spent
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.measure import ceilings

ENERGY = (Joules("gpu", 3.0, "counter"), Joules("cpu", 1.0, "estimated"))


def test_by_hand():
    """2 tokens in 42 ms: 2 J each, 1 kWh being 3.6 MJ at 0.36, so 0.2 a million. 26,280 over 10 months are
    0.001 a second: 42 ms for 2 tokens are 21 a million."""
    spent = Spent(2, 42e-3, ENERGY, Prices(electricity_per_kwh=0.36, hardware_price=26_280, life_months=10))

    assert spent.joules_per_token == 2.0
    assert spent.cost.electricity == pytest.approx(0.2)
    assert spent.cost.hardware == pytest.approx(21.0)
    assert str(spent) == "2.00 J/token (GPU 1.50, CPU 0.50 est.) · $21.20/1M tokens at full use"


def test_a_deeper_model_draws_the_same_watts_for_longer():
    spent = Spent(2, 42e-3, ENERGY, Prices(electricity_per_kwh=0.36)).times(5)

    assert [part.joules for part in spent.energy] == [15.0, 5.0]
    assert str(spent) == "10.0 J/token (GPU 7.50, CPU 2.50 est.) · $1.00/1M tokens, electricity only"


def test_a_run_says_what_it_used_and_cost(monkeypatch, tmp_path):
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
