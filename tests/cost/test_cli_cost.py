"""The command `moebox cost`, on ledgers that the tests write."""

import csv
import io
import json
import os
import subprocess
import sys
from datetime import datetime, timedelta

import click
import pytest
from click.testing import CliRunner
from pytest import approx

from helpers.ledger import make_record
from moebox.cli import main_group
from moebox.commands.cost import API_MODELS, Moment
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.prices.api_prices import api_prices
from moebox.cost.usage import Joules
from moebox.errors import LedgerError, MoeboxError, PricesError


def record(number, ago, user="ana", model="k2"):
    return make_record(
        id=str(number),
        begun_s=(datetime.now() - ago).timestamp(),
        model=model,
        user=user,
        prompt_tokens=1500,
        cached_tokens=500,
        completion_tokens=1000,
        queue_s=0.5,
        prefill_s=10.0,
        decode_s=40.0,
        finish_reason="stop",
        energy=(Joules("gpu", 20_000.0, "counter"), Joules("cpu", 4_000.0, "estimated")),
    )


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite3"
    with Ledger.open(path) as opened:
        opened.add(
            record(0, timedelta(days=20)), record(1, timedelta(days=3), "ben"), record(2, timedelta(hours=2))
        )
    monkeypatch.setenv("MOEBOX_LEDGER", str(path))
    monkeypatch.setenv("COLUMNS", "120")
    return path


def cost(*arguments):
    result = CliRunner().invoke(main_group, ["cost", *map(str, arguments)])
    if isinstance(result.exception, MoeboxError):
        raise result.exception
    return result


def data_of(*arguments):
    result = cost(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_text_begins_with_the_answer(ledger):
    shown = cost("--hardware-price", 25_000, "--subscription", 200)
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert lines[1].startswith("A million tokens cost $")
    assert "As it was used, owning costs" in lines[2]
    for word in ("energy counter", "estimated", "GPT-5", "at full utilisation", "2026-", "developer"):
        assert word in shown.stdout, word


def test_json_holds_the_ledgers_totals(ledger):
    data = data_of("--hardware-price", 25_000, "--other", 73, "--electricity", 0.36)
    with Ledger.open(ledger, read_only=True) as opened:
        (totals,) = opened.totals()
    total = data["total"]
    assert (
        (total["requests"], total["computed_tokens"])
        == (totals.requests, totals.usage.computed_tokens)
        == (3, 6000)
    )
    assert total["joules"] == approx(totals.usage.joules)
    million = total["per_million"]
    assert million["electricity"] == approx(72_000 / 3.6e6 * 0.36 / 6000 * 1e6)
    assert million["total"] == approx(million["electricity"] + million["hardware"] + million["other"])
    assert million["at_full_utilisation"]["hardware"] == approx(million["hardware"] * data["utilisation"])
    assert data["prices"]["other_per_month"] == 73
    assert {line["price"]["dated"] for line in data["hosted"]} != set()
    assert len(data["hosted"]) == len(API_MODELS)


@pytest.mark.parametrize(
    ("arguments", "requests"),
    [
        ([], 3),
        (["--since", "7d"], 2),
        (["--since", "12h"], 1),
        (["--since", "4w", "--until", "1d"], 2),
        (["--user", "ben"], 1),
        (["--model", "other"], 0),
        (["--until", (datetime.now() - timedelta(days=3)).date().isoformat()], 2),
        (["--since", (datetime.now() - timedelta(days=3)).date().isoformat(), "--user", "ben"], 1),
    ],
)
def test_ranges_and_filters(ledger, arguments, requests):
    assert data_of(*arguments)["total"]["requests"] == requests


def test_lines_by_user_as_csv(ledger):
    result = cost("--by", "user", "--csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["user"], row["requests"]) for row in rows] == [("ana", "2"), ("ben", "1"), ("total", "3")]
    assert rows[0]["cpu_method"] == "estimated"
    assert sum(float(row["money"]) for row in rows[:2]) == approx(float(rows[2]["money"]))


def test_a_page_is_written_beside_whatever_is_printed(ledger, tmp_path):
    page = tmp_path / "report.html"
    result = cost("--html", page, "--json")
    assert json.loads(result.stdout)["total"]["requests"] == 3
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(page) in result.stderr
    assert cost("--html", page).stdout == ""


def test_prices_of_a_file_and_of_options(ledger, tmp_path):
    prices, hosted = tmp_path / "prices.toml", tmp_path / "api.toml"
    prices.write_text("hardware_price = 10_000\nelectricity_per_kwh = 0.5\n")
    hosted.write_text("[house]\ninput_per_million = 1.0\noutput_per_million = 2.0\n")
    data = data_of("--prices", prices, "--electricity", 0.25, "--api", "house", "--api-prices", hosted)
    assert data["prices"]["hardware_price"] == 10_000
    assert data["prices"]["electricity_per_kwh"] == 0.25
    (line,) = data["hosted"]
    # 3 x (1,500 x 1 + 1,000 x 2) / 1e6, with cached tokens at the input price.
    assert (line["price"]["name"], line["money"]) == ("house", approx(0.0105))


def test_every_default_model_has_a_price():
    assert len(api_prices(API_MODELS)) == len(API_MODELS)


def test_an_unknown_model_is_refused_with_similar_names(ledger):
    with pytest.raises(PricesError, match="claude"):
        cost("--api", "claude-sonet-4-5")


def test_without_a_ledger_the_command_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBOX_LEDGER", str(tmp_path / "none"))
    shown = cost()
    assert shown.exit_code == 0
    assert "holds no requests" in shown.stdout and "moebox run" in shown.stdout
    assert data_of()["total"]["requests"] == 0
    assert not (tmp_path / "none").exists()
    with pytest.raises(LedgerError, match="there is no ledger here"):
        cost("--ledger", tmp_path / "none")


def test_a_range_without_requests(ledger):
    assert "everybody" in cost("--user", "nobody").stdout
    page = ledger.parent / "empty.html"
    cost("--user", "nobody", "--html", page)
    assert "holds no requests" in page.read_text(encoding="utf-8")


def test_the_scenario_without_a_ledger(tmp_path):
    shown = cost("--scenario", "kimi-k2-h100")
    assert "At 10 tok/s a million tokens cost $29.85, at 25 tok/s $11.94" in shown.stdout
    for text in ("19.9 tok/s", "29.8 tok/s", "119 tok/s", "from 4 developers on", "$89.94", "$2,400"):
        assert text in shown.stdout, text
    rows = list(csv.DictReader(io.StringIO(cost("--scenario", "kimi-k2-h100", "--csv").stdout)))
    assert [float(row["tokens_per_s"]) for row in rows] == [10, 15, 20, 25, 50, 100, 1000]
    assert float(rows[0]["total_per_million"]) == approx(29.85, abs=0.01)
    assert data_of("--scenario", "kimi-k2-h100")["owning"] == approx(784.38, abs=0.01)
    cheaper = data_of("--scenario", "kimi-k2-h100", "--hardware-price", 9000, "--subscription", 100)
    assert cheaper["hardware"] == 250
    assert cost("--scenario", "kimi-k2-h100", "--html", tmp_path / "s.html").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--csv"],
        ["--since", "yesterday"],
        ["--since", "7 days"],
        ["--utilisation", "1.5"],
        ["--by", "hour"],
        ["--electricity", "-1"],
        ["--scenario", "kimi-k2-h100", "--since", "7d"],
        ["--scenario", "kimi-k2-h100", "--share-idle"],
        ["--since", "1d", "--until", "2d"],
    ],
)
def test_wrong_usage(ledger, arguments):
    assert cost(*arguments).exit_code == 2


def test_a_day_of_until_counts_whole():
    since, until = Moment(), Moment(end=True)
    day = datetime(2026, 11, 1)
    assert since.convert("2026-11-01", None, None) == day.timestamp()
    assert until.convert("2026-11-01", None, None) == (day + timedelta(days=1)).timestamp()
    assert until.convert("2026-11-01T09:30", None, None) == datetime(2026, 11, 1, 9, 30).timestamp()
    with pytest.raises(click.BadParameter):
        since.convert("2026-13-01", None, None)


def test_a_broken_ledger_is_one_message_and_exit_code_1(tmp_path):
    (tmp_path / "l").write_text("no database, and longer than a header of SQLite's, which has 100 bytes" * 4)
    command = [
        sys.executable,
        "-c",
        "from moebox.cli import main; main()",
        "cost",
        "--ledger",
        tmp_path / "l",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is not a ledger" in done.stderr and "Traceback" not in done.stderr
