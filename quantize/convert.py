"""`moebox quantize`: a checkpoint of the Kimi K2 family -> the same model with INT4 experts.

The layout of the output follows from the config alone (`output/shards.py`), so the output's bytes do not
depend on the number of workers, on interruptions, or on where the source lies. The steps: look at the
destination, lock it, read and check the source's config, index and headers, check the disk (`prepare.py`);
convert shard after shard (`pipeline.py`); write the small files, `moebox.json` last.
"""

from __future__ import annotations

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moebox.errors import CheckpointError, PlanError
from moebox.files import writing
from moebox.offload.checkpoint.layout import MANIFEST_FILE, Manifest, load_manifest
from moebox.quantize.conversion import Conversion
from moebox.quantize.output.journal import LOCK_FILE, WORK_FOLDER, DestinationLock, Journal
from moebox.quantize.output.shards import SHARD_BYTES
from moebox.quantize.output.small_files import remove_output, write_manifest, write_small_files
from moebox.quantize.output.writer import remove_partials
from moebox.quantize.pipeline import Pipeline, open_shards
from moebox.quantize.prepare import (
    check_disk,
    default_workers,
    destination_state,
    disk_peak,
    effective_method,
    left_out,
    open_source,
    plan_conversion,
)
from moebox.quantize.progress import Meter, ProgressCallback
from moebox.quantize.same_source import check_same_run, journal_header, manifest_difference, manifest_source
from moebox.quantize.source import hub
from moebox.quantize.source.hub import parse_hub_id
from moebox.quantize.text import format_bytes, format_seconds

METHODS = ("rtn",)

log = logging.getLogger("moebox")


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` did. Bytes and seconds count this run only; `output_bytes` counts all shards."""

    folder: Path
    method: str
    shards: int
    shards_resumed: int
    source_bytes: int
    output_bytes: int
    elapsed_s: float
    rel_rms: float
    """Root mean square of the experts' relative errors; 0 for a passthrough."""
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"folder": str(self.folder), "left_out": list(self.left_out)}

    def render(self) -> str:
        """As text: what was made, how long it took, the error, and what is left out."""
        lines = [f"{self.folder}: {format_bytes(self.output_bytes)}, shards: {self.shards}"]
        if self.shards_resumed:
            lines[0] += f" ({self.shards_resumed} from an earlier run)"
        if self.shards > self.shards_resumed:
            rate = self.source_bytes / max(self.elapsed_s, 1e-9) / 1e9
            lines.append(
                f"read {format_bytes(self.source_bytes)} in {format_seconds(self.elapsed_s)}, {rate:.2f} GB/s"
            )
        lines.append(
            "experts passed through bit for bit"
            if self.method == "passthrough"
            else f"relative RMS error of the experts: {self.rel_rms:.4f}"
        )
        lines += [f"left out: {pattern}" for pattern in self.left_out]
        return "\n".join(lines)


def quantize(
    src: Path | str,
    dst: Path | str,
    *,
    method: str = "rtn",
    workers: int | None = None,
    resume: bool = True,
    delete_source: bool = False,
    progress: ProgressCallback | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizeResult:
    """Convert `src` into the folder `dst`; run again after any interruption to continue.

    Args:
        src: a checkpoint folder (FP8 128x128, BF16, F16, F32 or INT4 group 32), or a hub id
            (`organisation/model[@revision]`, with or without `hf://`), which is fetched shard by shard.
        dst: a folder that does not exist, is empty, or holds an unfinished run of the same conversion.
        method: "rtn": scales by least squared error, no calibration. INT4 experts are copied bit for bit.
        workers: threads; by default one per core that this process may use, fewer where memory demands.
        resume: False deletes what an earlier run left in `dst`.
        delete_source: delete each source shard once all output that needs it is synced; a hub model then
            never takes disk space for both copies.
        progress: called with a `ProgressReport` up to ten times a second, from any thread.
        shard_bytes: limit of an output shard's data.

    Raises:
        CheckpointError: the source is damaged or incomplete, or `dst` holds something else.
        ConfigError: `config.json` is of another family or contradicts itself.
        PlanError: the disk has not enough free space.
        BusyError: another process is writing `dst`.
    """
    dst = Path(dst)
    if method not in METHODS:
        raise PlanError(f"method {method!r} is not one of {', '.join(METHODS)}")
    _check_paths(src, dst)
    state = destination_state(dst)
    lock = DestinationLock(dst)
    with writing(dst):
        lock.acquire()
    run = _Run(src, dst, method, shard_bytes, delete_source=delete_source)
    try:
        with _terminable():
            if not resume:
                run.check_source()
                run.wipe()
            elif destination_state(dst) == "complete":
                return run.already_complete(lock)
            return run.convert(lock, workers, progress)
    finally:
        if not run.has_begun():
            lock.release_and_remove()
            run.remove_traces(folder_too=state == "absent")
        lock.release()


def _check_paths(src: Path | str, dst: Path) -> None:
    source, target = Path(src).resolve(), dst.resolve()
    if source.is_dir() and (source == target or source in target.parents or target in source.parents):
        raise CheckpointError(
            f"{dst}: lies in, is or holds the source {src}", "Give a destination beside the source."
        )
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{dst}: is a file", "Give a folder as destination.")


class _Run:
    """One call of `quantize`, made while the destination is locked."""

    def __init__(
        self, src: Path | str, dst: Path, method: str, shard_bytes: int, *, delete_source: bool
    ) -> None:
        self._src, self._dst, self._method, self._shard_bytes = src, dst, method, shard_bytes
        self._delete_source = delete_source
        self._work = dst / WORK_FOLDER
        self._journal = Journal(dst)
        self._start = time.monotonic()

    def check_source(self) -> None:
        """Refuse a bad source before `wipe` removes what an earlier run left."""
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch) / WORK_FOLDER
            source = open_source(self._src, work, None, keep_headers=False)
            try:
                plan_conversion(source, self._shard_bytes)
            finally:
                source.close()

    def wipe(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        with writing(self._dst):
            manifest = load_manifest(self._dst)
            self._journal.load()
            remove_output(self._dst, [*(manifest.shards if manifest else ()), *self._journal.shards])
            for path in self._work.rglob("*"):
                if path.is_file() and path.name != LOCK_FILE:
                    path.unlink()
            if self._is_hub():
                hub.remove_fetched(self._dst)
            remove_partials(self._dst)
        self._journal = Journal(self._dst)

    def has_begun(self) -> bool:
        """Whether a later run would have anything to resume."""
        return self._journal.path.exists()

    def remove_traces(self, *, folder_too: bool) -> None:
        """Remove what was fetched of a source that was then refused; a complete output is left alone."""
        if (self._dst / MANIFEST_FILE).exists():
            return
        if self._is_hub():
            hub.remove_fetched(self._dst)
        if folder_too:
            with suppress(OSError):  # another process may have begun to write there
                self._dst.rmdir()

    def _is_hub(self) -> bool:
        return not Path(self._src).exists() and parse_hub_id(str(self._src)) is not None

    def already_complete(self, lock: DestinationLock) -> QuantizeResult:
        """Check that the complete output was made from this source, and tidy up."""
        manifest = load_manifest(self._dst)
        difference = manifest_difference(self._src, manifest) if manifest else "unreadable manifest"
        if manifest is None or difference:
            raise CheckpointError(
                f"{self._dst}: is complete, but made from something else: {difference}",
                "Give another destination, or --no-resume to replace it.",
            )
        self._clean_up(lock)
        output_bytes = sum(shard["size"] for shard in manifest.shards.values())
        return self._result(manifest, len(manifest.shards), 0, output_bytes)

    def convert(
        self, lock: DestinationLock, workers: int | None, progress: ProgressCallback | None
    ) -> QuantizeResult:
        """Convert everything that an earlier run did not finish."""
        with writing(self._dst):
            remove_partials(self._dst)
        self._journal.load()
        source = open_source(self._src, self._work, self._journal.header, keep_headers=self._delete_source)
        try:
            result = self._convert(plan_conversion(source, self._shard_bytes), workers, progress)
        finally:
            source.close()
        self._clean_up(lock)
        return result

    def _clean_up(self, lock: DestinationLock) -> None:
        with writing(self._dst):
            if self._delete_source and self._is_hub():
                hub.remove_fetched(self._dst)
            lock.release_and_remove()

    def _convert(
        self, conversion: Conversion, workers: int | None, progress: ProgressCallback | None
    ) -> QuantizeResult:
        workers = default_workers(conversion.config, workers)
        header = journal_header(conversion, self._method, self._shard_bytes)
        if self._journal.header is not None:
            check_same_run(self._dst, self._journal.header, header)
        self._forget_lost_shards(conversion)
        self._check_disk(conversion, workers)
        if self._journal.header is None:
            with writing(self._journal.path):
                self._journal.start(header)
        resumed = len(self._journal.shards)
        bytes_of = {shard.file: conversion.source_bytes(shard) for shard in conversion.shards}
        total, done = sum(bytes_of.values()), sum(bytes_of[file] for file in self._journal.shards)
        if missing := left_out(conversion):
            log.warning("left out of the output: %s", ", ".join(missing))
        Pipeline(
            conversion,
            self._dst,
            self._journal,
            workers=workers,
            meter=Meter("quantize", total, len(conversion.shards), progress, (done, resumed)),
            delete_source=self._delete_source,
        ).run()
        manifest = self._write_small_files(conversion)
        return self._result(manifest, resumed, total - done, conversion.output_bytes)

    def _forget_lost_shards(self, conversion: Conversion) -> None:
        for shard in conversion.shards:
            path = self._dst / shard.file
            if shard.file in self._journal.shards and not (
                path.exists() and path.stat().st_size == shard.size
            ):
                log.warning("%s: was finished by an earlier run, but is gone; it is made again", path)
                del self._journal.shards[shard.file]

    def _check_disk(self, conversion: Conversion, workers: int) -> None:
        finished, delete = set(self._journal.shards), self._delete_source
        needed = disk_peak(conversion, self._dst, finished, open_shards(workers), delete_source=delete)
        check_disk(self._dst, needed, delete_source=delete)

    def _write_small_files(self, conversion: Conversion) -> Manifest:
        source = conversion.source
        write_small_files(self._dst, source.config, conversion.shards, source.extra_files())
        return write_manifest(
            self._dst,
            conversion.shards,
            self._journal.shards,
            method=effective_method(conversion, self._method),
            source=manifest_source(source),
            left_out=left_out(conversion),
        )

    def _result(
        self, manifest: Manifest, resumed: int, source_bytes: int, output_bytes: int
    ) -> QuantizeResult:
        errors = [extent.rel_rms for extents in manifest.experts.values() for extent in extents]
        mean_square = sum(error * error for error in errors) / max(len(errors), 1)
        return QuantizeResult(
            folder=self._dst,
            method=manifest.method,
            shards=len(manifest.shards),
            shards_resumed=resumed,
            source_bytes=source_bytes,
            output_bytes=output_bytes,
            elapsed_s=time.monotonic() - self._start,
            rel_rms=mean_square**0.5,
            left_out=tuple(manifest.left_out),
        )


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, with cleaning up, unless the program has its own handler."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
