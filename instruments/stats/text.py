"""The report of `moebox stats` for the terminal: two maps, the hit curve, and the recall of predictions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from moebox.console import percent, print_line, table_of
from moebox.instruments.stats import heat_map
from moebox.instruments.stats.heat_map import Map
from moebox.instruments.stats.report import Forgotten, HitCurve, StatsReport

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120
"""Columns if the output is not a terminal."""
LABEL_WIDTH = 6


def render_stats(result: StatsReport | HitCurve | Forgotten, console: Console) -> None:
    """Print `result`."""
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    match result:
        case StatsReport():
            _report(result, console)
        case HitCurve():
            _curve(result, console)
        case Forgotten():
            print_line(console, f"{result.model}: forgot {result.tokens:,} tokens ({result.file})")


def _report(report: StatsReport, console: Console) -> None:
    saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(report.saved_at_s))
    print_line(
        console,
        f"{report.model}: {len(report.layers)} MoE layers of {report.n_experts} experts, top {report.top_k}; "
        f"{report.tokens:,} tokens seen, {report.decoded_kept:,} decoded ones kept whole",
        "bold",
    )
    print_line(console, f"{report.file}, saved {saved}", "dim")
    use, place = heat_map.maps_of(report)
    _show_map(use, report, console)
    print_line(console, _shares(report))
    _show_map(place, report, console)
    if report.curve is not None:
        _curve(report.curve, console)
    print_line(console, _recall(report.recall))


def _curve(curve: HitCurve, console: Console) -> None:
    print_line(
        console,
        f"\nhits of a cache, replayed: {curve.tokens:,} tokens of {curve.source or 'a trace'}",
        "bold",
    )
    table = table_of("of the experts fit", *map(percent, curve.budgets))
    for policy, hits in curve.hits.items():
        table.add_row(policy, *(f"{share:.1%}" for share in hits))
    console.print(table)


def _show_map(shown: Map, report: StatsReport, console: Console) -> None:
    levels = shown.levels(max(1, console.width - LABEL_WIDTH))
    print_line(console, f"\n{shown.title}", "bold")
    labels = [f"{layer:>{LABEL_WIDTH - 2}}" for layer in report.layers]
    if console.is_terminal and console.color_system and not console.no_color:
        lines = [heat_map.legend(shown.scale), *heat_map.draw(levels, labels, shown.scale)]
    else:
        shades = shown.scale.ascii_shades if console.options.ascii_only else shown.scale.shades
        lines = [
            heat_map.legend_plain(shown.scale, shades),
            *heat_map.draw_plain(levels, labels, shades),
        ]
    for line in lines:
        console.print(line, no_wrap=True, crop=False, overflow="ignore")


def _shares(report: StatsReport) -> str:
    parts = (f"{percent(float(part))} have {share:.1%}" for part, share in report.shares.items())
    return f"of all uses, the most used experts: {', '.join(parts)}"


def _recall(recall: dict[str, float | None]) -> str:
    found = [f"{share:.1%} {ahead} ahead" for ahead, share in recall.items() if share is not None]
    return f"picks that predictions had named, by layers: {', '.join(found) or 'none were made yet'}"
