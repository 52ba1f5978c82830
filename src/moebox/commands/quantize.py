"""`moebox quantize`: a checkpoint -> the same with INT4 experts, or what that would take."""

from __future__ import annotations

from pathlib import Path

import click

from moebox.commands.options import FOLDER, json_option
from moebox.commands.output import new_console, print_report, quantize_progress


@click.command()
@click.argument("src")
@click.argument("dst", type=FOLDER)
@click.option(
    "--dry-run", is_flag=True, help="Print sizes, a time estimate and what stays in bf16; write nothing."
)
@click.option("--resume/--no-resume", default=True, help="Continue an earlier run's work, or start over.")
@click.option("--workers", type=click.IntRange(1), help="Experts quantized at once.  [default: one per core]")
@click.option("--delete-source", is_flag=True, help="Delete each source shard once nothing needs it.")
@json_option
def quantize(
    src: str, dst: Path, dry_run: bool, resume: bool, workers: int | None, delete_source: bool, as_json: bool
) -> None:
    """Quantize a checkpoint's routed experts to INT4.

    SRC is a checkpoint folder or a hub id such as moonshotai/Kimi-K2-Instruct; FP8, BF16, F16, F32 and
    native INT4 are read. DST gets a compressed-tensors checkpoint. Interrupt at any moment and run the same
    command again to continue.

    \b
    Examples:
      moebox quantize assets/tiny-k2 out/tiny-k2
      moebox quantize moonshotai/Kimi-K2-Instruct /nvme/k2 --delete-source
      moebox quantize /nvme/Kimi-K2-Thinking /nvme/k2t --dry-run
    """
    from moebox.quantize import convert, dryrun

    if dry_run:
        plan = dryrun.plan(src, dst, workers=workers, delete_source=delete_source)
        print_report(plan.to_dict(), as_json, lambda: dryrun.render_plan(plan, new_console()))
        return
    with quantize_progress() as show:
        result = convert.quantize(
            src, dst, workers=workers, resume=resume, delete_source=delete_source, progress=show
        )
    print_report(result.to_dict(), as_json, lambda: click.echo(result.render()))
