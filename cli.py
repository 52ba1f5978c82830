"""The `moebox` command: each command is options -> one call.

Answers go to stdout; prompts, progress and errors to stderr. Exit codes: 0 done, 1 a moebox error,
2 wrong usage, 130 interrupted. Every option has an environment twin, `MOEBOX_<COMMAND>_<OPTION>`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from moebox.commands.cost import cost
from moebox.commands.options import (
    LOADING,
    SAMPLING,
    ByteSize,
    DeviceName,
    Lengths,
    Names,
    Shares,
    answer_options,
    json_option,
    model_options,
    prefetch_option,
    store_option,
)
from moebox.errors import MoeboxError
from moebox.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from moebox.quantize.progress import ProgressDisplay
    from moebox.runtime.api import Model


@click.group(
    context_settings={
        "auto_envvar_prefix": "MOEBOX",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(__version__, "-V", "--version", message="moebox %(version)s")
def main_group() -> None:
    """Run trillion-parameter mixture-of-experts models of the Kimi K2 family on one box.

    Every option can also be given in the environment as MOEBOX_COMMAND_OPTION, for example
    MOEBOX_CHAT_CONTEXT=32768.
    """


@main_group.command()
@click.argument("src")
@click.argument("dst", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print sizes, a time estimate and what stays; write nothing.")
@click.option("--resume/--no-resume", default=True, help="Continue an earlier run's work, or start over.")
@click.option("--workers", type=click.IntRange(1), help="Experts in work at once.  [default: one per core]")
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
        _report(plan.to_dict(), as_json, lambda: dryrun.render_plan(plan, _console()))
        return
    with _progress() as show:
        result = convert.quantize(
            src, dst, workers=workers, resume=resume, delete_source=delete_source, progress=show
        )
    _report(result.to_dict(), as_json, lambda: click.echo(result.render()))


@main_group.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
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
    type=click.Path(file_okay=False, path_type=Path),
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

    with _progress() as show:
        report = inspection.inspect(
            folder, verify=verify, progress=show, add_checksums=add_checksums, stores=stores
        )
    _report(report.to_dict(), as_json, lambda: inspection.render_inspect(report, _console()))


@main_group.command()
@model_options
@click.argument("prompt")
@answer_options
@json_option
def run(
    prompt: str, system: str | None, tools: Path | None, thinking: bool, as_json: bool, **rest: Any
) -> int:
    """Answer one prompt and leave; "-" reads the prompt from stdin.

    The answer goes to stdout, reasoning and figures to stderr.

    \b
    Examples:
      moebox run out/tiny-k2 "Find me a Thai restaurant in San Jose." --tools tools.json
      git diff | moebox run /nvme/k2 - --system "Review this change." --json
    """
    from moebox.runtime.terminal import run as one_shot

    options = one_shot.RunOptions(prompt, system, tools, thinking, as_json, _sampling(rest))
    return one_shot.main(_load(rest), options)


@main_group.command()
@model_options
@answer_options
@click.option(
    "--load", type=click.Path(dir_okay=False, path_type=Path), help="Go on with a chat that /save wrote."
)
def chat(system: str | None, tools: Path | None, thinking: bool, load: Path | None, **rest: Any) -> int:
    """Chat in the terminal; /help shows the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    \b
    Examples:
      moebox chat out/tiny-k2 --tools tools.json
      moebox chat /nvme/k2 --context 65536 --backbone int8
    """
    from moebox.runtime.terminal import chat as terminal_chat

    options = terminal_chat.ChatOptions(system, tools, thinking, load=load, sampling=_sampling(rest))
    return terminal_chat.main(_load(rest), options)


@main_group.command()
@click.argument("dst", type=click.Path(file_okay=False, path_type=Path))
@click.option("--shape", type=click.Choice(["kimi-k2", "tiny"]), default="kimi-k2", help="Whose dimensions.")
@click.option("--layers", type=click.IntRange(1), help="Layers, dense ones included.  [default: the shape's]")
@click.option("--experts", type=click.IntRange(1), help="Routed experts a layer.  [default: the shape's]")
@click.option(
    "--format",
    "weights",
    type=click.Choice(["fp8", "bf16", "int4"]),
    default="fp8",
    help="As Kimi-K2-Instruct, unquantized, or as Kimi-K2-Thinking.",
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
    _report(result.to_dict(), as_json, lambda: click.echo(result.render()))


@main_group.command()
def demo() -> None:
    """Quantize the bundled tiny-k2 and ask it a question that needs a tool; offline, under a minute."""
    from moebox.commands.demo import run_demo

    run_demo(_console(), _console(stderr=True))


@main_group.command()
@click.argument("model", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--shape", type=click.Choice(["kimi-k2", "tiny"]), help="Random weights of this shape instead.")
@click.option("--layers", type=click.IntRange(1), help="Depth of the random model, dense layers included.")
@click.option("--device", type=DeviceName(), help="cpu, cuda or cuda:N.  [default: a GPU if there is one]")
@click.option(
    "--vram",
    type=ByteSize(),
    help="GPU memory for the whole model; fewer --layers get their share. 0: no experts on the GPU.  "
    "[default: what is free]",
)
@click.option(
    "--ram",
    type=ByteSize(),
    help="Memory for the whole model, likewise; MODEL's experts beyond it are read from disk.  "
    "[default: all of them]",
)
@click.option("--context", type=click.IntRange(1), help="Tokens of cache in --vram.  [default: a part of it]")
@click.option("--prompt-tokens", type=Lengths(), default="512,4096", help="Prompts to measure; empty: none.")
@click.option("--decode-tokens", type=click.IntRange(0), default=128, help="Tokens after the last prompt.")
@click.option(
    "--routing",
    help="synthetic: a trace with published locality; model: the router's picks; or a trace's file.  "
    "[default: model for MODEL, else synthetic]",
)
@click.option("--threads", type=click.IntRange(1), help="Cores to use.  [default: all, less one for a GPU]")
@store_option
@prefetch_option
@json_option
def bench(as_json: bool, **options: Any) -> None:
    """Measure prompts and decoding beside what the box could do at best.

    MODEL is a quantized checkpoint. With --shape, random weights of that shape are made in memory; where
    they are fewer --layers than the shape has, budgets are for the whole model, the run gets its share, and
    the report says what that is at full depth.

    \b
    Examples:
      moebox bench /nvme/k2
      moebox bench --shape kimi-k2 --layers 9 --vram 80GB --prompt-tokens 512 --json
      moebox bench out/tiny-k2 --device cpu --prompt-tokens 64 --decode-tokens 32
      moebox bench /nvme/k2 --device cpu --ram 300GiB --context 8192
    """
    from moebox.instruments.bench.bench import bench as run_bench
    from moebox.instruments.bench.target import BenchOptions
    from moebox.instruments.bench.text import render_bench

    if (options["model"] is None) == (options["shape"] is None):
        raise click.UsageError("give a checkpoint's folder or --shape, one of them")
    with _LoadProgress(_console(stderr=True)) as show:
        report = run_bench(BenchOptions(**options), show)
    _report(report.to_dict(), as_json, lambda: render_bench(report, _console()))


@main_group.command()
@click.argument("model", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder with copies of MODEL's shards, or with shards that it lacks; may be repeated.",
)
@click.option("--deep", is_flag=True, help="Read every byte of MODEL and compare its checksums.")
@json_option
def doctor(model: Path | None, stores: tuple[Path, ...], deep: bool, as_json: bool) -> int:
    """Look at this machine and at MODEL: what is wrong, what is slow, what it costs and what to do.

    Nothing is written but the machine's profile: the bandwidths of memory, GPU and drives, by which `moebox
    plan` and loading go. Drives are measured by reading MODEL's shards. Exit code 1 where a check fails.

    \b
    Examples:
      moebox doctor
      moebox doctor /nvme/k2 --deep
      moebox doctor /nvme/k2 --json | jq '.checks[] | select(.status != "pass")'
    """
    from moebox.instruments.doctor.doctor import DoctorOptions, examine
    from moebox.instruments.doctor.text import render_doctor

    with _console(stderr=True).status("looking at the machine") as status:
        report = examine(DoctorOptions(model, stores, deep), status.update)
    _report(report.to_dict(), as_json, lambda: render_doctor(report, _console()))
    return int(report.failed)


@main_group.command()
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
    type=click.Choice(["bf16", "int8", "nf4"]),
    default="bf16",
    help="Precision of everything but the experts; on a GPU bf16.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Predict hits from a file of --record-trace.  [default: what is known of MODEL, or published]",
)
@store_option
@json_option
def plan(model: str | None, as_json: bool, **options: Any) -> None:
    """Say what goes where, how fast it will run and what would help most; nothing is loaded.

    MODEL is a checkpoint's folder or a hub id, of which only headers are read. What was never measured of
    this box is measured first, in some seconds.

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
    _report(made.to_dict(), as_json, lambda: render_plan(made, _console()))


@main_group.command()
@click.argument("model", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw the maps to this file.")
@click.option("--reset", is_flag=True, help="Forget what is known of MODEL, and show nothing.")
@click.option(
    "--merge",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add another box's statistics of MODEL first; may be repeated.",
)
@click.option(
    "--replay",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Replay a file of --record-trace; MODEL may be left out then.  [default: what MODEL decoded last]",
)
@click.option("--budget", type=Shares(), default="5%,10%,20%,50%", help="Shares of all experts that fit.")
@click.option(
    "--policy",
    type=Names("decayed", "lru", "lfu", "belady"),
    default="decayed,lru,lfu,belady",
    help="Who goes when a cache is full: decayed is what the tiers do, belady knows the future.",
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
    _report(result.to_dict(), as_json, lambda: render_stats(result, _console()))


main_group.add_command(cost)


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options that were given; the others stay the checkpoint's."""
    return {name: options[name] for name in SAMPLING if options.get(name) not in (None, ())}


def _load(options: dict[str, Any]) -> Model:
    from moebox.instruments.plan.plan import loaded_line
    from moebox.runtime.api import load

    with _LoadProgress(_console(stderr=True)) as show:
        model = load(options["model"], progress=show, **{name: options[name] for name in LOADING})
    click.secho(loaded_line(model.engine), dim=True, err=True)
    saved = model.engine.backbone_saved_bytes
    if saved:
        note = f"backbone in {options['backbone']}: {model.engine.backbone_bytes / 1e6:,.1f} MB, "
        click.secho(f"{note}{saved / 1e6:,.1f} MB less than in bf16", dim=True, err=True)
    return model


class _LoadProgress:
    """A bar per stage of loading, on a terminal only, gone when loading has finished."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _LoadProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(f"loading {stage}", total=total_bytes)
        self._bar.update(self._tasks[stage], completed=done_bytes)


def _progress() -> ProgressDisplay:
    from moebox.quantize.progress import ProgressDisplay

    return ProgressDisplay(_console(stderr=True))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _report(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(data, default=str))
    else:
        show()


class _DimLines(logging.Handler):
    """Shows the library's notices as one dim line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record`."""
        click.secho(f"moebox: {record.getMessage()}", dim=True, err=True)


def main() -> None:
    """Entry point: run a command, turn errors into messages and exit codes."""
    logging.getLogger("moebox").addHandler(_DimLines())
    try:
        code = main_group.main(standalone_mode=False)
    except MoeboxError as error:
        click.secho(f"moebox: {error.what}", fg="red", err=True)
        if error.fix:
            click.echo(error.fix, err=True)
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:  # the reader of stdout left, e.g. `moebox inspect | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)
