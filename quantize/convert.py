"""`moebox quantize`: a checkpoint of the Kimi K2 family -> the same model with INT4 experts.

The plan of the output follows from the config alone (`shards.py`), so its bytes do not depend on the
number of workers, on interruptions or on where the source lies. Order of events: look at the
destination, lock it, read the source's headers, check everything that headers tell, check the disk;
then shard after shard (`pipeline.py`), then the small files, and `moebox.json` last.
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

from moebox.config import ModelConfig
from moebox.errors import CheckpointError, PlanError
from moebox.files import writing
from moebox.offload.checkpoint.layout import MANIFEST_FILE, Manifest, load_manifest
from moebox.quantize.dryrun import plan
from moebox.quantize.output.journal import LOCK_FILE, WORK_FOLDER, DestinationLock, Journal
from moebox.quantize.output.shards import SHARD_BYTES
from moebox.quantize.output.small_files import digest, remove_output, write_manifest, write_small_files
from moebox.quantize.output.writer import remove_partials
from moebox.quantize.pipeline import Model, Pipeline, open_shards
from moebox.quantize.prepare import (
    check_disk,
    default_workers,
    destination_state,
    disk_peak,
    effective_method,
    left_out,
    load_model,
    open_source,
)
from moebox.quantize.progress import Meter, ProgressCallback, format_bytes, format_seconds
from moebox.quantize.source import hub
from moebox.quantize.source.hub import parse_hub_id
from moebox.quantize.source.origin import Source, sample_sha256
from moebox.version import __version__

__all__ = ["METHODS", "QuantizeResult", "plan", "quantize"]

METHODS = ("rtn",)

log = logging.getLogger("moebox")


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` did; bytes and seconds are those of this run, `output_bytes` of all shards."""

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
        """For people: what was made, what it cost, what it lacks."""
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
            (`organisation/model[@revision]`, with or without `hf://`), fetched shard by shard.
        dst: a folder that does not exist, is empty, or holds an unfinished run of the same conversion.
        method: "rtn": scales by least squared error, no calibration. INT4 experts pass through as they are.
        workers: threads; default one per core this process may use, fewer where memory demands.
        resume: False throws away what an earlier run left in `dst`.
        delete_source: delete each source shard once all output that needs it is safely on disk; a hub
            model then never needs room for both copies.
        progress: called with a `ProgressReport` a few times a second, from any thread.
        shard_bytes: limit of an output shard's data.

    Raises:
        CheckpointError: the source is damaged or incomplete, or `dst` holds something else.
        ConfigError: `config.json` is of another family or contradicts itself.
        PlanError: the disk has not enough room.
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
    """One call of `quantize`, with the destination locked."""

    def __init__(
        self, src: Path | str, dst: Path, method: str, shard_bytes: int, *, delete_source: bool
    ) -> None:
        self._src, self._dst, self._method, self._shard_bytes = src, dst, method, shard_bytes
        self._delete_source = delete_source
        self._work = dst / WORK_FOLDER
        self._journal = Journal(dst)
        self._start = time.monotonic()

    def check_source(self) -> None:
        """Refuse a bad source before anything of an earlier run is thrown away."""
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch) / WORK_FOLDER
            source = open_source(self._src, work, None, keep_headers=False)
            try:
                load_model(source, self._shard_bytes)
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
        """Whether there is anything to resume."""
        return self._journal.path.exists()

    def remove_traces(self, *, folder_too: bool) -> None:
        """Remove what a source that was then refused had put here; a complete output is left alone."""
        if (self._dst / MANIFEST_FILE).exists():
            return
        if self._is_hub():
            hub.remove_fetched(self._dst)
        if folder_too:
            with suppress(OSError):  # another process may have taken it meanwhile
                self._dst.rmdir()

    def _is_hub(self) -> bool:
        return not Path(self._src).exists() and parse_hub_id(str(self._src)) is not None

    def already_complete(self, lock: DestinationLock) -> QuantizeResult:
        """Nothing to do, if it is this source that `dst` was made from."""
        manifest = load_manifest(self._dst)
        difference = _manifest_mismatch(self._src, manifest) if manifest else "unreadable manifest"
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
        """The whole conversion, from wherever an earlier run stopped."""
        with writing(self._dst):
            remove_partials(self._dst)
        self._journal.load()
        source = open_source(self._src, self._work, self._journal.header, keep_headers=self._delete_source)
        try:
            result = self._convert(source, workers, progress)
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
        self, source: Source, workers: int | None, progress: ProgressCallback | None
    ) -> QuantizeResult:
        model, config = load_model(source, self._shard_bytes)
        workers = default_workers(config, workers)
        header = self._header(model)
        self._compare_with_journal(header)
        self._forget_lost_shards(model)
        resumed = len(self._journal.shards)
        delete, finished = self._delete_source, set(self._journal.shards)
        needed = disk_peak(model, self._dst, finished, open_shards(workers), delete_source=delete)
        check_disk(self._dst, needed, delete_source=delete)
        if self._journal.header is None:
            with writing(self._journal.path):
                self._journal.start(header)
        bytes_of = {shard.file: model.source_bytes(shard) for shard in model.shards}
        done = sum(bytes_of[file] for file in self._journal.shards)
        meter = Meter("quantize", sum(bytes_of.values()), len(model.shards), progress, (done, resumed))
        _say_what_is_left_out(model)
        pipeline = Pipeline(
            model,
            self._dst,
            self._journal,
            workers=workers,
            meter=meter,
            delete_source=delete,
        )
        pipeline.run()
        manifest = self._finish(model, config)
        output_bytes = sum(shard.size for shard in model.shards)
        return self._result(manifest, resumed, sum(bytes_of.values()) - done, output_bytes)

    def _compare_with_journal(self, header: dict[str, Any]) -> None:
        if self._journal.header is None:
            return
        for name, value in _flat(header).items():
            before = _flat(self._journal.header).get(name)
            if before != value:
                raise CheckpointError(
                    f"{self._dst}: was begun with {name} = {before}, now it is {value}",
                    "Run the former command, or start over with --no-resume.",
                )

    def _header(self, model: Model) -> dict[str, Any]:
        source = model.source
        return {
            "moebox": __version__,
            "method": self._method,
            "shard_bytes": self._shard_bytes,
            "config": digest(source.config),
            "index": digest(source.weight_map),
            "source": {
                "name": source.name,
                "revision": source.revision,
                "files": {file: facts.to_dict() for file, facts in sorted(source.facts.items())},
            },
        }

    def _forget_lost_shards(self, model: Model) -> None:
        for shard in model.shards:
            path = self._dst / shard.file
            if shard.file in self._journal.shards and not (
                path.exists() and path.stat().st_size == shard.size
            ):
                log.warning("%s: was finished by an earlier run, but is gone; it is made again", path)
                del self._journal.shards[shard.file]

    def _finish(self, model: Model, config: ModelConfig) -> Manifest:
        source = model.source
        write_small_files(self._dst, source.config, model.shards, source.extra_files())
        return write_manifest(
            self._dst,
            model.shards,
            self._journal.shards,
            method=effective_method(model, self._method),
            source=_manifest_source(source),
            left_out=left_out(model),
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


def _flat(header: dict[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in header.items() if name != "source"}
    source = header["source"]
    files = {
        f"{file}: {fact}": value for file, facts in source["files"].items() for fact, value in facts.items()
    }
    return flat | {"source": source["name"], "revision": source["revision"]} | files


def _manifest_source(source: Source) -> dict[str, Any]:
    files = {file: facts.content() for file, facts in sorted(source.facts.items())}
    revision = {"revision": source.revision} if source.revision else {}
    return {"name": source.name, **revision, "files": files}


def _manifest_mismatch(src: Path | str, manifest: Manifest) -> str | None:
    """What tells `src` from the source of a finished conversion; None if nothing does."""
    folder = Path(src)
    repo = None if folder.exists() else parse_hub_id(str(src))
    name = repo[0] if repo else folder.resolve().name
    if name != manifest.source.get("name"):
        return f"{manifest.source.get('name')}, not {name}"
    if repo is not None:
        return None
    for file, facts in manifest.source.get("files", {}).items():
        path = folder / file
        if path.exists() and (
            path.stat().st_size != facts["size"] or sample_sha256(path) != facts.get("sample_sha256")
        ):
            return f"{file} was another file then"
    return None


def _say_what_is_left_out(model: Model) -> None:
    missing = left_out(model)
    if missing:
        log.warning("left out of the output: %s", ", ".join(missing))


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, unless the program has a handler of its own."""
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
