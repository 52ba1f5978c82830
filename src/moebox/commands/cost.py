"""`moebox cost`: reports on the ledger, or on a scenario, in the form that the options choose."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moebox.commands.options import FILE, Command, add_options, json_option

if TYPE_CHECKING:
    from rich.console import Console

    from moebox.cost.page.page import Page
    from moebox.cost.prices.box_prices import Prices
    from moebox.cost.report.report import Report

API_MODELS = ("kimi-k2-thinking", "gpt-5", "claude-sonnet-4-5", "grok-4")
"""Hosted models to compare with where the options name none."""
UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
PRICE_FIELDS = {
    "electricity": "electricity_per_kwh",
    "hardware_price": "hardware_price",
    "life_months": "life_months",
    "residual": "residual",
    "other": "other_per_month",
    "utilisation": "utilisation",
}
"""Options that set a field of `Prices`, and the field's name."""


class Moment(click.ParamType[float]):
    """A time ago such as `7d`, or a day such as `2026-11-01`, as a Unix time by this machine's clock."""

    name = "when"

    def __init__(self, *, end: bool = False) -> None:
        self.end = end
        """Whether a day stands for its end, not its begin."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse `value`; click reports a usage error where it is no time."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        ago = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([hdw])", text)
        if ago:
            return (datetime.now() - float(ago[1]) * UNITS[ago[2]]).timestamp()
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            self.fail(f"{value!r} is no time such as 7d, 12h, 2026-11-01 or 2026-11-01T09:30", param, ctx)
        whole_day = re.fullmatch(r"[0-9]{4}-?[0-9]{2}-?[0-9]{2}", text) is not None
        return (at + timedelta(days=1) if whole_day and self.end else at).timestamp()


def what_options(command: Command) -> Command:
    """Add the options that select requests, and the lines of the report."""
    return add_options(
        command,
        click.option(
            "--since", type=Moment(), help="From then on: 7d, 12h, 4w, or 2026-11-01.  [default: all]"
        ),
        click.option(
            "--until", type=Moment(end=True), help="Until then; a day counts whole.  [default: now]"
        ),
        click.option("--model", help="Only of this model: its folder's name."),
        click.option("--user", help="Only of this user or API key."),
        click.option(
            "--by",
            type=click.Choice(["model", "user", "day"]),
            default="model",
            help="One line for each of these.",
        ),
        click.option("--ledger", type=FILE, help="The ledger's file.  [default: the user's own]"),
    )


def price_options(command: Command) -> Command:
    """Add the options for the prices of the box, and for what it is compared with."""
    amount = click.FloatRange(0)
    return add_options(
        command,
        click.option("--prices", type=FILE, help="A file of prices.  [default: prices.toml of the user's]"),
        click.option("--electricity", type=amount, help="Price of a kWh.  [default: 0.176]"),
        click.option("--hardware-price", type=amount, help="Price of the box.  [default: left out]"),
        click.option(
            "--life-months", type=click.FloatRange(0, min_open=True), help="Its life.  [default: 36]"
        ),
        click.option("--residual", type=amount, help="What it is still worth then.  [default: 0]"),
        click.option("--other", type=amount, help="Other costs a month.  [default: 0]"),
        click.option(
            "--utilisation",
            type=click.FloatRange(0, 1, min_open=True),
            help="Part of the time that it works, instead of the measured one.",
        ),
        click.option("--share-idle", is_flag=True, help="Charge tokens with the energy of waiting, too."),
        click.option(
            "--api",
            multiple=True,
            help=f"A hosted model to compare with; may be repeated.  [default: {', '.join(API_MODELS)}]",
        ),
        click.option("--api-prices", type=FILE, help="A file of your own with hosted models' prices."),
        click.option(
            "--subscription",
            type=amount,
            help="Price of one developer's subscription a month.",
        ),
    )


@click.command()
@what_options
@price_options
@click.option("--scenario", help="Sums of a box on paper instead of the ledger's: kimi-k2-h100.")
@click.option("--csv", "as_csv", is_flag=True, help="Print the lines as comma-separated values.")
@click.option("--html", type=FILE, help="Write one page with charts to this file.")
@json_option
def cost(as_json: bool, as_csv: bool, html: Path | None, scenario: str | None, **options: Any) -> None:
    """Say what tokens cost: energy, money by part, hosted models beside it, and when owning pays.

    The figures are those of the ledger, to which every answer adds a row without its text. Prices come from
    a file and from the options; list prices of hosted models are of the day that is named, and nothing is
    looked up. A token is one that was computed: of a prompt, where it was not cached, or of an answer.

    \b
    Examples:
      moebox cost --hardware-price 25000
      moebox cost --since 7d --by user --csv
      moebox cost --since 2026-11-01 --subscription 200 --html report.html
      moebox cost --scenario kimi-k2-h100
    """
    if as_json and as_csv:
        raise click.UsageError("give --json or --csv, one of them")
    if options["since"] and options["until"] and options["since"] >= options["until"]:
        raise click.UsageError("--since has to be before --until")
    report = _scenario(scenario, options) if scenario else _ledger(options)
    if html is not None:
        from moebox.cost.page.page import write_page

        write_page(report.page(), html)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        click.echo(json.dumps(report.data()))
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows(report.rows())
    elif html is None:
        from rich.console import Console

        report.show(Console(highlight=False))


@dataclass(frozen=True)
class _Forms:
    """Functions that give a report in each of its forms."""

    data: Callable[[], dict[str, Any]]
    rows: Callable[[], list[list[object]]]
    page: Callable[[], Page]
    show: Callable[[Console], None]


def _ledger(options: dict[str, Any]) -> _Forms:
    from moebox.cost.report.page import report_page
    from moebox.cost.report.rows import csv_rows
    from moebox.cost.report.text import render_report

    report = _report(options)
    return _Forms(
        report.to_dict,
        lambda: csv_rows(report),
        lambda: report_page(report),
        lambda console: render_report(report, console),
    )


def _report(options: dict[str, Any]) -> Report:
    from moebox.cost.ledger.ledger import Ledger, ledger_path
    from moebox.cost.prices.api_prices import api_prices
    from moebox.cost.report.report import ReportOptions, empty_report, make_report

    prices = _prices(options)
    names = options["api"] or API_MODELS
    chosen = ReportOptions(
        prices,
        since_s=options["since"],
        until_s=options["until"],
        model=options["model"],
        user=options["user"],
        by=options["by"],
        api=tuple(api_prices(names, options["api_prices"], prices.per_usd)),
        subscription=options["subscription"] or None,
        share_idle=options["share_idle"],
    )
    if options["ledger"] is None and not ledger_path().exists():
        return empty_report(chosen, ledger_path())
    with Ledger.open(options["ledger"], read_only=True) as ledger:
        return make_report(ledger, chosen)


def _prices(options: dict[str, Any]) -> Prices:
    from moebox.cost.prices.box_prices import load_prices

    return load_prices(options["prices"], **_price_fields(options))


def _price_fields(options: dict[str, Any]) -> dict[str, Any]:
    return {field: options[name] for name, field in PRICE_FIELDS.items()}


LEDGER_OPTIONS = (
    *("since", "until", "model", "user", "ledger"),
    *("prices", "api", "api_prices", "share_idle"),
)


def _scenario(name: str, options: dict[str, Any]) -> _Forms:
    from moebox.cost.scenario.page import scenario_page
    from moebox.cost.scenario.rows import scenario_rows
    from moebox.cost.scenario.scenario import find_scenario, run_scenario
    from moebox.cost.scenario.text import render_scenario

    for option in LEDGER_OPTIONS:
        if options[option]:
            raise click.UsageError(
                f"--{option.replace('_', '-')} is not for --scenario, which reads no ledger"
            )
    report = run_scenario(find_scenario(name, options["subscription"], **_price_fields(options)))
    return _Forms(
        report.to_dict,
        lambda: scenario_rows(report),
        lambda: scenario_page(report),
        lambda console: render_scenario(report, console),
    )
