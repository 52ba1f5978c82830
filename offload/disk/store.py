"""Reads experts from drives: with O_DIRECT, in aligned pieces, by native threads, from one drive or several.

A shard may lie in the model's folder, in other folders (`stores`), or in several of them. All its copies are
read, and if one fails the others are read instead. A key is `moe_index * E + expert`, E n_routed_experts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from moebox import _kernels
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import Manifest, load_manifest
from moebox.offload.checkpoint.locate import find_experts
from moebox.offload.checkpoint.safetensors import Checkpoint, TensorInfo, find_shards
from moebox.offload.disk.base import Bytes, DriveTraffic, StoreTraffic
from moebox.offload.machine.drive_speed import DriveSpeed, measure_drive
from moebox.offload.machine.drives import drive_at
from moebox.offload.machine.profile import MachineProfile

log = logging.getLogger("moebox")

Run = tuple[int, int, int]
"""Bytes that lie one behind the other: the reader's number of the file, offset, length."""

PIECE_BYTES = 1 << 20
"""Bytes of one read of the drive. An expert of 24.8 MB is 24 pieces, which keep a drive busy alone."""

DEFAULT_DEPTH = 8
"""Pieces under way at once on a drive that was not measured."""

_FIXES = {
    "io": "Check the drive; restore the shard, or name a folder with a copy of it by --store.",
    "short_read": "The file is truncated; restore it.",
    "changed": "The shard was replaced or written to while the model ran; start again.",
    "checksum": "The file or its drive is damaged; `moebox inspect FOLDER --verify` checks all shards.",
}


class ExpertStore:
    """Implements `Store` for a quantized checkpoint.

    Thread-safe, except that a ticket belongs to one thread at a time. Until `wait` or `cancel` has ended a
    ticket, nothing else may use its row.

    Attributes:
        reader: the native reader, which other native code may share.
        n_keys: L * E.
        expert_bytes: of one expert.
        drives: identity of a drive (`drives.drive_at`) -> the shards on it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        reader: _kernels.Reader,
        runs: Sequence[list[Run]],
        checksums: Sequence[int] | None,
        drives: Mapping[str, list[Path]],
    ) -> None:
        self.reader = reader
        self.drives = drives
        self.n_keys = len(runs)
        self.expert_bytes = checkpoint.config.expert_bytes
        self._config = checkpoint.config
        self._runs = runs
        self._checksums = checksums
        self._rows: dict[int, tuple[int, Bytes]] = {}

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        folders: Sequence[Path] = (),
        *,
        depth: int | None = None,
        verify: bool = False,
        direct: bool = True,
    ) -> ExpertStore:
        """Open the shards that hold experts; nothing is read yet.

        Args:
            folders: more folders with copies of shards than the checkpoint was opened with.
            depth: pieces under way at once on each drive. By default what the machine's profile says; a drive
                that it does not know is measured now, and the profile saved.
            verify: compare every expert with its checksum.
            direct: read with O_DIRECT, past the page cache, where the file system supports it.

        Raises:
            CheckpointError: a tensor is missing, of a wrong shape or type, or not where `moebox.json` says;
                copies differ; a shard cannot be opened; (verify) there are no checksums.
        """
        tensors = [infos for experts in find_experts(checkpoint).values() for infos in experts]
        manifest = load_manifest(checkpoint.folder)
        checksums = _checksums(checkpoint, manifest) if verify else None
        names = sorted({info.file.name for infos in tensors for info in infos})
        shards = checkpoint.shards
        if folders:
            shards = find_shards(checkpoint.folder, [*checkpoint.stores, *folders], names)
        reader = _kernels.Reader(depth or DEFAULT_DEPTH, PIECE_BYTES)
        files = {name: _add_file(reader, shards[name], direct) for name in names}
        if direct:
            _warn_buffered({name: shards[name] for name in names if not reader.direct(files[name])})
        drives = _drives(path for name in names for path in shards[name])
        store = cls(checkpoint, reader, [_runs(infos, files) for infos in tensors], checksums, drives)
        if depth is None:
            store._set_depths()
        return store

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def runs(self, key: int) -> list[Run]:
        """Where the expert's bytes lie on drives, in the order in which they lie in a row."""
        return self._runs[key]

    def checksum(self, key: int) -> int | None:
        """XXH3-64 of the expert; None if the store was opened without `verify`."""
        return None if self._checksums is None else self._checksums[key]

    def submit(self, key: int, row: Bytes, *, prefetch: bool = False) -> int:
        """Begin to read an expert into `row`, uint8 [expert_bytes]; never blocks.

        A `prefetch` is read when no other read is queued. Returns a ticket.
        """
        ticket = self.reader.submit(self._runs[key], row, prefetch, self.checksum(key))
        self._rows[ticket] = key, row
        return ticket

    def ready(self, ticket: int) -> bool:
        """Whether the read has ended, successfully or not."""
        return self.reader.ready(ticket)

    def wait(self, ticket: int) -> None:
        """Wait until the row holds the expert. The ticket ends, unless Ctrl-C comes first.

        Raises:
            CheckpointError: the expert could not be read, or its checksum is wrong.
        """
        try:
            self.reader.wait(ticket)
        except _kernels.ReadFailure as failure:
            key, _ = self._rows.pop(ticket)
            raise self.error(failure, key) from None
        finally:
            self._log_given_up()
        del self._rows[ticket]

    def promote(self, ticket: int) -> None:
        """Give a prefetch the priority of other reads."""
        self.reader.promote(ticket)

    def cancel(self, ticket: int) -> int:
        """Stop a read and end its ticket; returns the bytes read for nothing. The row is free on return."""
        nbytes = self.reader.cancel(ticket)
        del self._rows[ticket]
        return nbytes

    def in_order(self, keys: Sequence[int]) -> list[int]:
        """`keys` shard by shard, in the order of their offsets."""
        return sorted(keys, key=lambda key: self._runs[key][0])

    def read(self, key: int, row: Bytes) -> None:
        """Read an expert into `row`, uint8 [expert_bytes], and wait for it.

        Raises:
            CheckpointError: as `wait`.
        """
        self.wait(self.submit(key, row))

    def error(self, failure: _kernels.ReadFailure, key: int) -> CheckpointError:
        """The error that tells a user of an expert's failed read."""
        _, kind, path, offset, _ = failure.args
        moe, expert = divmod(key, self._config.n_routed_experts)
        name = self._config.expert_name(self._config.moe_layers[moe], expert)
        what = str(failure.args[0]).removeprefix(f"{path}: byte {offset}: ")
        return CheckpointError(f"{path}: {name}: byte {offset}: {what}", _FIXES[kind])

    def traffic(self) -> StoreTraffic:
        """What was read so far."""
        self._log_given_up()
        return StoreTraffic(tuple(DriveTraffic(*drive) for drive in self.reader.traffic()))

    def measure_depth(self) -> dict[str, DriveSpeed]:
        """Measure each drive that holds enough of the model, and save the result in the machine's profile.

        Returns:
            Identity of a drive -> GB/s by queue depth, read with O_DIRECT.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        speeds = {}
        for drive, paths in self.drives.items():
            speed = measure_drive(paths, PIECE_BYTES)
            if speed is not None and speed.direct:
                speeds[drive] = speed
        _save(speeds)
        return speeds

    def _set_depths(self) -> None:
        profile = MachineProfile.load()
        for drive, paths in self.drives.items():
            depth = profile.drive_depth(drive)
            if depth is None:
                speed = measure_drive(paths, PIECE_BYTES)
                if speed is None or not speed.direct:
                    continue
                _save({drive: speed})
                depth = speed.depth
            for path in paths:
                self.reader.set_depth(str(path), depth)

    def close(self) -> None:
        """Cancel all reads."""
        for ticket in list(self._rows):
            self.cancel(ticket)

    def _log_given_up(self) -> None:
        for message, *_ in self.reader.take_given_up():
            log.warning("%s: this copy is not used any more; the others are read instead", message)


def _drives(paths: Iterable[Path]) -> dict[str, list[Path]]:
    drives: dict[str, list[Path]] = {}
    for path in paths:
        drives.setdefault(drive_at(path).identity, []).append(path)
    return drives


def _save(speeds: Mapping[str, DriveSpeed]) -> None:
    profile = MachineProfile.load()
    for drive, speed in speeds.items():
        profile.put("drive", drive, speed.figures())
        log.info("%s: %.2f GB/s with %d reads under way", drive, speed.gbps, speed.depth)
    if speeds:
        profile.save()


def _warn_buffered(shards: Mapping[str, Sequence[Path]]) -> None:
    if shards:
        log.warning(
            "%s and %d more shards: O_DIRECT is refused here; they are read through the page cache, "
            "which costs a copy and RAM for a second one",
            next(iter(shards.values()))[0],
            len(shards) - 1,
        )


def _add_file(reader: _kernels.Reader, copies: Sequence[Path], direct: bool) -> int:
    try:
        file = reader.add_file([str(copy) for copy in copies], direct)
    except _kernels.ReadFailure as failure:
        _, kind, path, *_ = failure.args
        raise CheckpointError(f"{path}: cannot be opened: {failure.args[0]}", _FIXES[kind]) from None
    return file


def _runs(infos: Sequence[TensorInfo], files: dict[str, int]) -> list[Run]:
    """The runs of some tensors: those that lie one behind the other are one run."""
    runs: list[Run] = []
    for info in infos:
        file, offset, nbytes = runs[-1] if runs else (-1, 0, 0)
        if (files[info.file.name], info.offset) == (file, offset + nbytes):
            runs[-1] = file, offset, nbytes + info.nbytes
        else:
            runs.append((files[info.file.name], info.offset, info.nbytes))
    return runs


def _checksums(checkpoint: Checkpoint, manifest: Manifest | None) -> list[int]:
    extents = (
        []
        if manifest is None
        else [e for layer in checkpoint.config.moe_layers for e in manifest.experts[layer]]
    )
    if not extents or any(extent.xxh3 is None for extent in extents):
        raise CheckpointError(
            f"{checkpoint.folder}: no checksums of experts to compare reads with",
            f"`moebox inspect {checkpoint.folder} --add-checksums` adds them to a folder that moebox wrote.",
        )
    return [int(extent.xxh3, 16) for extent in extents if extent.xxh3 is not None]
