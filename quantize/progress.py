"""Progress of `quantize` and of `inspect --verify`: what is reported, and how the command line shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from moebox.quantize.text import format_bytes, format_seconds

PLAIN_INTERVAL_S = 5.0


@dataclass(frozen=True)
class ProgressReport:
    """How far a long job is.

    `stage` is "fetch", "quantize" or "verify". Bytes are those of the source that are read, or for "verify"
    those of the files that are hashed. `done_bytes` include `resumed_bytes`, which an earlier run did.
    """

    stage: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    elapsed_s: float
    shard: int
    shards: int
    fetched_bytes: int = 0
    """Bytes that this run has fetched from the hub."""

    @property
    def gbps(self) -> float:
        """GB/s since this run began."""
        return (self.done_bytes - self.resumed_bytes) / self.elapsed_s / 1e9 if self.elapsed_s > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the rate so far; None before the first bytes."""
        return (self.total_bytes - self.done_bytes) / self.gbps / 1e9 if self.gbps > 0 else None

    def line(self) -> str:
        """`quantize 12 % · 3.10 GB of 25.83 GB · 1.21 GB/s · shard 2/7 · 0:19 left`."""
        percent = 100 * self.done_bytes / self.total_bytes if self.total_bytes else 100.0
        eta = "" if self.eta_s is None else f" · {format_seconds(self.eta_s)} left"
        fetched = f" · {self.fetched_bytes / 1e9:.2f} GB fetched" if self.fetched_bytes else ""
        return (
            f"{self.stage} {percent:.0f} % · "
            f"{format_bytes(self.done_bytes)} of {format_bytes(self.total_bytes)} · "
            f"{self.gbps:.2f} GB/s · shard {self.shard}/{self.shards}{fetched}{eta}"
        )


ProgressCallback = Callable[[ProgressReport], None]


class Meter:
    """Counts bytes from several threads and reports at most ten times a second."""

    def __init__(
        self,
        stage: str,
        total_bytes: int,
        shards: int,
        callback: ProgressCallback | None,
        resumed: tuple[int, int] = (0, 0),
    ) -> None:
        self._stage, self._total, self._shards, self._callback = stage, total_bytes, shards, callback
        self._resumed, self._shard = resumed
        self._done = self._resumed
        self._fetched = 0
        self._start = time.monotonic()
        self._last = 0.0
        self._lock = threading.Lock()

    def add(self, nbytes: int, *, stage: str | None = None) -> None:
        """Count `nbytes` more."""
        with self._lock:
            self._done += nbytes
            self._report(stage or self._stage, force=False)

    def add_fetched(self, nbytes: int) -> None:
        """Count `nbytes` more that were fetched from the hub."""
        with self._lock:
            self._fetched += nbytes
            self._report(self._stage, force=False)

    def touch(self, stage: str) -> None:
        """Report although nothing has changed, so that users see that a long wait goes on."""
        with self._lock:
            self._report(stage, force=False)

    def finish_shard(self) -> None:
        """Count one more finished shard."""
        with self._lock:
            self._shard += 1
            self._report(self._stage, force=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the job began."""
        return time.monotonic() - self._start

    def _report(self, stage: str, *, force: bool) -> None:
        now = time.monotonic()
        if self._callback is None or (not force and now - self._last < 0.1):
            return
        self._last = now
        report = ProgressReport(
            stage,
            self._done,
            self._total,
            self._resumed,
            now - self._start,
            self._shard,
            self._shards,
            self._fetched,
        )
        self._callback(report)


class ProgressDisplay:
    """Draws reports on `console`: a bar on a terminal, otherwise a plain line every few seconds.

    Use as a context manager and pass the object itself as the `progress` callback.
    """

    def __init__(self, console: Console, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._console, self._interval_s = console, interval_s
        self._next = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, report: ProgressReport) -> None:
        """Show `report`."""
        if self._bar is not None:
            self._bar.update(
                self._task, total=report.total_bytes, completed=report.done_bytes, description=report.line()
            )
        elif report.elapsed_s >= self._next or report.shard == report.shards:
            self._next = report.elapsed_s + self._interval_s
            self._console.print(report.line(), markup=False, highlight=False, soft_wrap=True)
