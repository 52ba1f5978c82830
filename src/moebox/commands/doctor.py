"""`moebox doctor`: checks of the machine and of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from moebox.commands.options import FOLDER, json_option, model_argument
from moebox.commands.output import new_console, print_report


@click.command()
@model_argument(required=False)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=FOLDER,
    help="A folder with copies of MODEL's shards, or with shards that it lacks; may be repeated.",
)
@click.option("--deep", is_flag=True, help="Read every byte of MODEL and compare its checksums.")
@json_option
def doctor(model: Path | None, stores: tuple[Path, ...], deep: bool, as_json: bool) -> int:
    """Look at this machine and at MODEL: what is wrong, what is slow, what it costs and what to do.

    Nothing is written but the machine's profile: the bandwidths of memory, GPU and drives, which `moebox
    plan` and loading use. Drives are measured by reading MODEL's shards. Exit code 1 where a check fails.

    \b
    Examples:
      moebox doctor
      moebox doctor /nvme/k2 --deep
      moebox doctor /nvme/k2 --json | jq '.checks[] | select(.status != "pass")'
    """
    from moebox.instruments.doctor.doctor import DoctorOptions, examine
    from moebox.instruments.doctor.text import render_doctor

    with new_console(stderr=True).status("looking at the machine") as status:
        report = examine(DoctorOptions(model, stores, deep), status.update)
    print_report(report.to_dict(), as_json, lambda: render_doctor(report, new_console()))
    return int(report.failed)
