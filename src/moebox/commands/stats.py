"""`moebox stats`: which experts a model's router picks, and what caches would hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moebox.commands.options import FILE, Names, Shares, json_option, model_argument
from moebox.commands.output import new_console, print_report


@click.command()
@model_argument(required=False)
@click.option("--png", type=FILE, help="Draw the maps to this file.")
@click.option("--reset", is_flag=True, help="Delete MODEL's statistics, and show nothing.")
@click.option(
    "--merge",
    multiple=True,
    type=FILE,
    help="Add another box's statistics of MODEL first; may be repeated.",
)
@click.option(
    "--replay",
    type=FILE,
    help="Replay a file of --record-trace; MODEL may be left out then.  [default: what MODEL decoded last]",
)
@click.option("--budget", type=Shares(), default="5%,10%,20%,50%", help="Shares of all experts that fit.")
@click.option(
    "--policy",
    type=Names("decayed", "lru", "lfu", "belady"),
    default="decayed,lru,lfu,belady",
    help="What a full cache evicts: decayed is moebox's rule; belady evicts by the trace's later picks.",
)
@json_option
def stats(
    as_json: bool, png: Path | None, budget: tuple[float, ...], policy: tuple[str, ...], **options: Any
) -> None:
    """Show which experts MODEL's router picks, where they live, and what caches would hit.

    The figures are those that running MODEL has left in the user's data folder. Nothing is loaded.

    \b
    Examples:
      moebox stats out/tiny-k2
      moebox stats /nvme/k2 --png k2.png --json
      moebox stats --replay routing.npz --budget 5%,10%,20% --policy decayed,lru,belady
    """
    from moebox.instruments.stats import report as stats_report
    from moebox.instruments.stats.text import render_stats

    if options["model"] is None and (png or options["merge"] or options["reset"] or not options["replay"]):
        raise click.UsageError("give a checkpoint's folder; only --replay goes without")
    asked = stats_report.StatsOptions(**options, budgets=budget, policies=policy)
    result = stats_report.report_stats(asked)
    if png is not None and isinstance(result, stats_report.StatsReport):
        from moebox.instruments.stats.image import write_png

        write_png(result, png)
    print_report(result.to_dict(), as_json, lambda: render_stats(result, new_console()))
