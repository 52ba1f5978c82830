"""`moebox bench`: prompts and decoding, measured."""

from __future__ import annotations

from typing import Any

import click

from moebox.commands.options import field_options, json_option, model_argument
from moebox.commands.output import LoadProgress, new_console, print_report
from moebox.instruments.bench.options import BenchOptions


@click.command()
@model_argument(required=False)
@field_options(BenchOptions)
@json_option
def bench(as_json: bool, **options: Any) -> None:
    """Measure prompts and decoding beside what the box could do at best.

    MODEL is a quantized checkpoint. With --shape, random weights of that shape are made in memory. With
    fewer --layers than the shape has, budgets are those of the whole model: the run gets its share of them,
    and the report also gives the figures of full depth.

    \b
    Examples:
      moebox bench /nvme/k2
      moebox bench --shape kimi-k2 --layers 9 --vram 80GB --prompt-tokens 512 --json
      moebox bench out/tiny-k2 --device cpu --prompt-tokens 64 --decode-tokens 32
      moebox bench /nvme/k2 --device cpu --ram 300GiB --context 8192
    """
    from moebox.instruments.bench.bench import bench as run_bench
    from moebox.instruments.bench.text import render_bench

    if (options["model"] is None) == (options["shape"] is None):
        raise click.UsageError("give a checkpoint's folder or --shape, one of them")
    with LoadProgress() as show:
        report = run_bench(BenchOptions(**options), show)
    print_report(report.to_dict(), as_json, lambda: render_bench(report, new_console()))
