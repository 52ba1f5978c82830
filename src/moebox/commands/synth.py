"""`moebox synth`: a random checkpoint of a true shape."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from moebox.commands.options import FOLDER, json_option
from moebox.commands.output import print_report


@click.command()
@click.argument("dst", type=FOLDER)
@click.option(
    "--shape",
    type=click.Choice(["kimi-k2", "tiny"]),
    default="kimi-k2",
    help="The model whose dimensions it has.",
)
@click.option("--layers", type=click.IntRange(1), help="Layers, dense ones included.  [default: the shape's]")
@click.option("--experts", type=click.IntRange(1), help="Routed experts a layer.  [default: the shape's]")
@click.option(
    "--format",
    "weights",
    type=click.Choice(["fp8", "bf16", "int4"]),
    default="fp8",
    help="fp8: as Kimi-K2-Instruct; bf16: unquantized; int4: as Kimi-K2-Thinking.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Same seed, same bytes.")
@json_option
def synth(
    dst: Path,
    shape: Literal["kimi-k2", "tiny"],
    layers: int | None,
    experts: int | None,
    weights: Literal["fp8", "bf16", "int4"],
    seed: int,
    as_json: bool,
) -> None:
    """Write a random checkpoint of a true shape, to try a box before the real download.

    \b
    Examples:
      moebox synth /nvme/two-layers --layers 2
      moebox synth /tmp/small --shape tiny --format int4
    """
    from moebox.quantize.synth.write import synth as write_synthetic

    result = write_synthetic(dst, shape, layers=layers, experts=experts, format=weights, seed=seed)
    print_report(result.to_dict(), as_json, lambda: click.echo(result.render()))
