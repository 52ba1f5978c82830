"""`moebox inspect`: shapes, sizes, quantization errors and checksums of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from moebox.commands.options import FOLDER, json_option
from moebox.commands.output import new_console, print_report, quantize_progress


@click.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--verify", is_flag=True, help="Read every shard and expert and compare hashes with moebox.json."
)
@click.option(
    "--add-checksums",
    is_flag=True,
    help="Verify, and add checksums of experts to a moebox.json of an older version.",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=FOLDER,
    help="A folder with copies of shards, or with shards that FOLDER lacks; may be repeated.",
)
@json_option
def inspect(folder: Path, verify: bool, add_checksums: bool, stores: tuple[Path, ...], as_json: bool) -> None:
    """Show a checkpoint's shapes, sizes and quantization errors.

    \b
    Examples:
      moebox inspect out/tiny-k2
      moebox inspect /nvme/k2 --verify --store /nvme2/k2
    """
    from moebox.quantize.check import inspect as inspection

    with quantize_progress() as show:
        report = inspection.inspect(
            folder, verify=verify, progress=show, add_checksums=add_checksums, stores=stores
        )
    print_report(report.to_dict(), as_json, lambda: inspection.render_inspect(report, new_console()))
