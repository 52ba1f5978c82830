"""Accounts of requests: measured, priced and written, also at the end of the program."""

import getpass
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.power import Clock, SteppingGpu
from moebox.cost.accounts import Accounts, login_name
from moebox.cost.energy.gpu_energy import GpuEnergy
from moebox.cost.energy.meter import EnergyMeter
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.writer import LedgerWriter
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules, Traffic, Usage, add_energy, total_joules

USED = Usage(
    prompt_tokens=120,
    cached_tokens=20,
    completion_tokens=50,
    prefill_s=1.0,
    decode_s=9.0,
    traffic=Traffic(1, 2, 3, 4, 5, 6),
)
DONE = (USED, "stop")


@pytest.fixture
def box():
    """A GPU that draws 100 W, and a clock that tests move."""
    clock = Clock()
    gpu = SteppingGpu(clock)
    return clock, gpu, EnergyMeter([GpuEnergy(gpu, clock)], clock, clock)


@pytest.fixture
def accounts(box, tmp_path):
    accounts = Accounts(box[2], Prices(), LedgerWriter(tmp_path / "ledger"))
    yield accounts
    accounts.close()


def rows(accounts):
    accounts.writer.flush()
    with Ledger.open(accounts.writer.path, read_only=True) as ledger:
        return list(ledger.requests()), list(ledger.idle())


def test_a_request_becomes_a_row(accounts, box):
    request = accounts.begin("kimi-k2", "ada")
    request.tokens(100)
    box[0].wait(10)
    waited = replace(USED, queue_s=2.5)
    record = request.end(waited, "stop")
    assert rows(accounts)[0] == [record]
    assert (record.model, record.user, record.finish_reason) == ("kimi-k2", "ada", "stop")
    assert record.usage == replace(waited, energy=record.usage.energy)
    assert record.usage.joules == pytest.approx(1000, rel=0.02)
    assert {part.source: part.method for part in record.usage.energy} == {"gpu": "counter"}


def test_each_request_has_an_id_of_its_own(accounts):
    for _ in range(3):
        accounts.begin("m", "u").end(*DONE)
    assert len({record.id for record in rows(accounts)[0]}) == 3


def test_waiting_before_the_call_is_part_of_the_time(accounts):
    waited = accounts.begin("m", "u").end(replace(USED, queue_s=100.0), "stop")
    later = accounts.begin("m", "u").end(*DONE)
    assert later.begun_s - waited.begun_s == pytest.approx(100.0, abs=5)


def test_joules_of_requests_and_idle_spells_sum_to_the_measured_ones(accounts, box):
    clock, gpu, meter = box
    clock.wait(30)
    first = accounts.begin("m", "ada")
    clock.wait(5)
    gpu.draw(400)
    second = accounts.begin("m", "bob")
    first.tokens(1)
    second.tokens(3)
    clock.wait(7)
    first.end(*DONE)
    clock.wait(2)
    second.end(*DONE)
    gpu.draw(60)
    clock.wait(100)
    accounts.close()
    requests, idle = rows(accounts)
    assert [round(spell.seconds) for spell in idle] == [30, 100]
    joules = [part.joules for part in (*(record.usage for record in requests), *idle)]
    measured = total_joules(meter.measured())
    assert sum(joules) == pytest.approx(measured)
    assert measured == pytest.approx(30 * 100 + 5 * 100 + 9 * 400 + 100 * 60, rel=0.02)


def test_money_by_hand(box):
    """3.6 MJ are a kWh: at 0.20 a kWh, 150 tokens of 7,200 J cost 0.0004, so a million cost 2.66667.

    A box of 26,280 over 10 months costs 2,628 a month of 2,628,000 s: 10 s are 0.01, a million tokens 66.667.
    """
    usage = replace(USED, energy=(Joules("gpu", 7200, "counter"),))
    bare = Accounts(box[2], Prices(electricity_per_kwh=0.20))
    cost = bare.cost(usage)
    assert (cost.electricity, cost.hardware, cost.other) == (pytest.approx(2.66667, rel=1e-5), 0, 0)
    owned = Accounts(box[2], Prices(electricity_per_kwh=0.20, hardware_price=26_280, life_months=10))
    cost = owned.cost(usage)
    assert (cost.hardware, cost.total) == (
        pytest.approx(66.6667, rel=1e-5),
        pytest.approx(69.33333, rel=1e-5),
    )
    assert cost.utilisation == 1
    assert bare.cost(replace(usage, prompt_tokens=20, completion_tokens=0)) is None
    for accounts in (bare, owned):
        accounts.close()


def test_without_a_ledger_nothing_is_written(box, tmp_path):
    accounts = Accounts(box[2], Prices())
    record = accounts.begin("m", "u").end(*DONE)
    accounts.close()
    assert record.usage.completion_tokens == 50
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "raise RuntimeError"])
def test_the_end_of_the_program_writes_what_is_left(tmp_path, ending):
    code = (
        "from moebox.cost.accounts import Accounts\n"
        "from moebox.cost.prices.box_prices import Prices\n"
        "from moebox.cost.usage import Traffic, Usage\n"
        "accounts = Accounts.open(None, Prices())\n"
        f"accounts.begin('m', 'u').end(*{DONE!r})\n"
        f"{ending}\n"
    )
    path = tmp_path / "ledger"
    environment = os.environ | {"MOEBOX_LEDGER": str(path)}
    subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False
    )
    with Ledger.open(path, read_only=True) as ledger:
        assert len(list(ledger.requests())) == 1
        assert len(list(ledger.idle())) == 2  # before it, and after it


def test_the_login_name_of_a_user_without_a_name(monkeypatch):
    assert login_name()

    def nameless():
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert login_name() == str(os.getuid())


def test_the_method_of_a_sum_is_that_of_its_least_certain_part():
    some = (Joules("gpu", 5.0, "counter"), Joules("cpu", 1.0, "counter"))
    others = (Joules("dram", 3.0, "counter"), Joules("gpu", 2.0, "power"), Joules("cpu", 1.0, "estimated"))
    assert add_energy(some, others) == add_energy(others, some) == (
        Joules("gpu", 7.0, "power"), Joules("cpu", 2.0, "estimated"), Joules("dram", 3.0, "counter"),
    )  # fmt: skip
    assert add_energy((), ()) == ()
