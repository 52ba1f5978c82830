"""`moebox plan`: what goes where and how fast it will run; nothing is loaded."""

from __future__ import annotations

from typing import Any

import click

from moebox.commands.options import FILE, ByteSize, json_option, store_option
from moebox.commands.output import new_console, print_report
from moebox.option_fields import options_of
from moebox.runtime.engine.options import LoadOptions


@click.command()
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(["kimi-k2", "tiny"]), help="A model of this shape instead.")
@click.option("--gpu", help="A GPU by name, such as h100-80gb, or none: plan for another box with it.")
@click.option("--vram", type=ByteSize(), help="GPU memory.  [default: the GPU's, or what is free here]")
@click.option(
    "--ram",
    type=ByteSize(),
    help="Memory: all of another box, or what may be used of this one.  [default: what is free here]",
)
@click.option("--nvme-gbps", type=float, help="GB/s of all drives together.  [default: as measured here]")
@click.option("--ram-gbps", type=float, help="GB/s of reading RAM.  [default: as measured here]")
@click.option("--context", type=click.IntRange(1), help="Tokens of context.  [default: what fits]")
@click.option(
    "--backbone",
    type=click.Choice(options_of(LoadOptions)["backbone"].choices),
    default="bf16",
    help="Precision of everything but the experts; on a GPU bf16.",
)
@click.option(
    "--trace",
    type=FILE,
    help="Predict hits from a file of --record-trace.  [default: what is known of MODEL, or published]",
)
@store_option
@json_option
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Say what goes where, how fast it will run and what would help most; nothing is loaded.

    MODEL is a checkpoint's folder or a hub id, of which only headers are read. Parts of this box that were
    never measured are measured first, in some seconds.

    \b
    Examples:
      moebox plan --shape kimi-k2 --gpu h100-80gb --ram 512GiB --nvme-gbps 7 --context 262144
      moebox plan moonshotai/Kimi-K2-Thinking --gpu rtx-5090-32gb --ram 768GiB
      moebox plan /nvme/k2 --ram 200GiB --json
    """
    from moebox.instruments.plan.box import BoxOptions
    from moebox.instruments.plan.plan import PlanOptions, make_plan
    from moebox.instruments.plan.text import render_plan

    if (model is None) == (options["shape"] is None):
        raise click.UsageError("give a checkpoint's folder, a hub id or --shape, one of them")
    box = BoxOptions(**{name: options.pop(name) for name in ("gpu", "vram", "ram", "nvme_gbps", "ram_gbps")})
    made = make_plan(PlanOptions(model, box=box, **options))
    print_report(made.to_dict(), as_json, lambda: render_plan(made, new_console()))
