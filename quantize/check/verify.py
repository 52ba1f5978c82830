"""Hashing a quantized checkpoint in one pass: SHA-256 of each shard, XXH3-64 of each expert."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebox.errors import CheckpointError
from moebox.kernels.cpu import allowed_cpus
from moebox.offload.checkpoint.layout import (
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    ExpertExtent,
    Manifest,
    expert_checksum,
)
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.page_cache import drop_cache
from moebox.quantize.progress import Meter, ProgressCallback

Bytes = npt.NDArray[np.uint8]

_CHUNK_BYTES = 4 << 20


@dataclass
class _Found:
    """Hashes of one copy of a shard: its SHA-256, and the checksum of the expert at each offset."""

    sha256: str = ""
    xxh3: dict[int, str] = field(default_factory=dict)


def verify_shards(
    checkpoint: Checkpoint, manifest: Manifest | None, progress: ProgressCallback | None
) -> Manifest:
    """Read every copy of every shard and compare it with the manifest.

    Returns:
        The manifest, with checksums of those experts that had none.

    Raises:
        CheckpointError: there is no manifest; a shard cannot be read, or a hash differs.
    """
    if manifest is None:
        raise CheckpointError(
            f"{checkpoint.folder}: no {MANIFEST_FILE}, so nothing to verify against",
            "Only folders written by `moebox quantize` carry hashes.",
        )
    experts: dict[str, list[ExpertExtent]] = {file: [] for file in manifest.shards}
    for extents in manifest.experts.values():
        for extent in extents:
            experts[extent.file].append(extent)
    copies = [
        (path, file)
        for file in manifest.shards
        for path in checkpoint.shards.get(file, [checkpoint.folder / file])
    ]
    total = sum(manifest.shards[file]["size"] for _, file in copies)
    meter = Meter("verify", total, len(copies), progress)
    with ThreadPoolExecutor(allowed_cpus(), thread_name_prefix="verify") as pool:
        found = list(pool.map(lambda copy: _read(copy[0], experts[copy[1]], meter), copies))
    _compare(manifest, experts, copies, found)
    by_file = {file: one.xxh3 for (_, file), one in zip(copies, found, strict=True)}
    return replace(
        manifest,
        format=MANIFEST_FORMAT,
        experts={
            layer: [replace(extent, xxh3=by_file[extent.file][extent.offset]) for extent in extents]
            for layer, extents in manifest.experts.items()
        },
    )


def _compare(
    manifest: Manifest,
    experts: dict[str, list[ExpertExtent]],
    copies: Sequence[tuple[Path, str]],
    found: Sequence[_Found],
) -> None:
    wrong = []
    for (path, file), one in zip(copies, found, strict=True):
        expected = manifest.shards[file]["sha256"]
        if one.sha256 != expected:
            wrong.append(f"{path}: SHA-256 is {one.sha256}, {MANIFEST_FILE} says {expected}")
        wrong += [
            f"{path}: expert at byte {extent.offset}: XXH3-64 is {one.xxh3[extent.offset]}, "
            f"{MANIFEST_FILE} says {extent.xxh3}"
            for extent in experts[file]
            if extent.xxh3 not in (None, one.xxh3[extent.offset])
        ]
    if wrong:
        raise CheckpointError("\n".join(wrong), "The file has changed since; quantize the source again.")


def _read(path: Path, experts: Sequence[ExpertExtent], meter: Meter) -> _Found:
    found, sha256 = _Found(), hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            for begin, piece in _pieces(file, experts):
                sha256.update(piece.data)
                if begin is not None:
                    found.xxh3[begin] = expert_checksum(piece)
                meter.add(len(piece))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    drop_cache(path)
    meter.finish_shard()
    found.sha256 = sha256.hexdigest()
    return found


def _pieces(file: FileIO, experts: Sequence[ExpertExtent]) -> Iterator[tuple[int | None, Bytes]]:
    """The file in pieces: each expert whole, with its offset; the bytes between them in chunks, with None."""
    position = 0
    for extent in sorted(experts, key=lambda extent: extent.offset):
        yield from _chunks(file, extent.offset - position)
        expert = _take(file, extent.nbytes)
        if len(expert) < extent.nbytes:
            raise OSError(errno.EIO, "the file was cut short while it was read")
        yield extent.offset, expert
        position = extent.offset + extent.nbytes
    while len(piece := _take(file, _CHUNK_BYTES)):
        yield None, piece


def _chunks(file: FileIO, nbytes: int) -> Iterator[tuple[None, Bytes]]:
    for begin in range(0, nbytes, _CHUNK_BYTES):
        yield None, _take(file, min(_CHUNK_BYTES, nbytes - begin))


def _take(file: FileIO, nbytes: int) -> Bytes:
    """The next `nbytes`, or fewer at the end of the file."""
    piece = np.empty(nbytes, np.uint8)
    done = 0
    while done < nbytes and (count := file.readinto(piece[done:].data)):
        done += count
    return piece[:done]
