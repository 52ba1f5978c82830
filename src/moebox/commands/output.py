"""What several commands of `moebox` print: reports, progress, and how a model was loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from moebox.quantize.progress import ProgressDisplay
    from moebox.runtime.api import Model
    from moebox.runtime.engine.options import LoadOptions


def new_console(*, stderr: bool = False) -> Console:
    """A console that highlights nothing."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_report(data: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """One line of JSON, or what `show` prints."""
    if as_json:
        click.echo(json.dumps(data, default=str))
    else:
        show()


def quantize_progress() -> ProgressDisplay:
    """Progress of quantizing and verifying, on stderr."""
    from moebox.quantize.progress import ProgressDisplay

    return ProgressDisplay(new_console(stderr=True))


class LoadProgress:
    """A bar per stage of loading on stderr, on a terminal only; it disappears when loading has finished.

    A context manager; called with (stage, bytes done, bytes in all).
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        shown = new_console(stderr=True)
        self._bar = Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> LoadProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(f"loading {stage}", total=total_bytes)
        self._bar.update(self._tasks[stage], completed=done_bytes)


def load_model(path: Path, options: LoadOptions) -> Model:
    """Load with progress; then one line on stderr says the plan, another what a quantized backbone saves."""
    from moebox.instruments.plan.plan import loaded_line
    from moebox.runtime.api import load

    with LoadProgress() as show:
        model = load(path, options=replace(options, progress=show))
    click.secho(loaded_line(model.engine), dim=True, err=True)
    saved = model.engine.backbone_saved_bytes
    if saved:
        note = f"backbone in {options.backbone}: {model.engine.backbone_bytes / 1e6:,.1f} MB, "
        click.secho(f"{note}{saved / 1e6:,.1f} MB less than in bf16", dim=True, err=True)
    return model
