"""A source in a local folder."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from moebox.config import CONFIG_FILE, read_json
from moebox.errors import CheckpointError
from moebox.files import existing_folder, writing
from moebox.offload.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    parse_header,
    read_header_bytes,
    read_index,
    release_mappings,
)
from moebox.quantize.progress import Meter
from moebox.quantize.source.base import FileFacts, HeaderStore, is_copied

_SAMPLES, _SAMPLE_BYTES = 8, 4096
_COPIED_LIMIT_BYTES = 256 << 20


class FolderSource:
    """A checkpoint in a local folder: `fetch` only checks that its shards are still there."""

    is_local = True
    revision = ""

    def __init__(
        self,
        folder: Path,
        store: HeaderStore,
        facts: dict[str, FileFacts] | None = None,
        *,
        keep_headers: bool = False,
    ) -> None:
        """Read config, index and all headers.

        Args:
            folder: the checkpoint.
            store: headers that an earlier run kept.
            facts: the shards as an earlier run found them; a shard that is gone now is known from `store`.
            keep_headers: put headers into `store`, because shards may be deleted during the conversion.

        Raises:
            ConfigError: no readable `config.json`.
            CheckpointError: no index, or a shard is missing or damaged.
        """
        self.folder = folder
        self.name = folder.resolve().name
        self.config = read_json(folder / CONFIG_FILE)
        self._store, self._keep_headers = store, keep_headers
        known = facts or {}
        self.headers: dict[str, dict[str, TensorInfo]] = {}
        self.facts: dict[str, FileFacts] = {}
        for file in self._files(known):
            raw, size = self._header(file, known)
            self.headers[file] = parse_header(folder / file, raw, size)
            self.facts[file] = self._facts(file, raw, size, known)
        if (folder / INDEX_FILE).exists():
            self.weight_map = read_index(folder)
        else:
            self.weight_map = dict.fromkeys(self.headers[SINGLE_FILE], SINGLE_FILE)

    def _files(self, known: dict[str, FileFacts]) -> list[str]:
        if SINGLE_FILE in known and not (self.folder / INDEX_FILE).exists():
            return [SINGLE_FILE]
        return sorted(set(read_index(self.folder).values()))

    def _header(self, file: str, known: dict[str, FileFacts]) -> tuple[bytes, int]:
        path = self.folder / file
        kept = self._store.load(file) if file in known else None
        if kept is not None and not path.exists():
            return kept
        raw, size = read_header_bytes(path)
        if self._keep_headers and kept is None:
            self._store.save(file, raw, size)
        return raw, size

    def _facts(self, file: str, raw: bytes, size: int, known: dict[str, FileFacts]) -> FileFacts:
        path = self.folder / file
        if not path.exists():
            return known[file]
        sample, stamp = sample_sha256(path), str(path.stat().st_mtime_ns)
        return FileFacts(size, hashlib.sha256(raw).hexdigest(), sample, stamp)

    def fetch(self, files: Iterable[str], meter: Meter, stop: threading.Event) -> None:
        """Check that `files` are there and have their size."""
        for file in files:
            path = self.folder / file
            if not path.exists():
                raise CheckpointError(f"{path}: no such file", "Fetch the missing shard.")
            if path.stat().st_size != self.facts[file].size:
                raise CheckpointError(
                    f"{path}: changed while it was being quantized", "Start over with --no-resume."
                )

    def prefetch(self, files: Iterable[str]) -> None:
        """Nothing: the shards are on a local disk."""

    def bytes_to_fetch(self, files: Iterable[str]) -> int:
        """0: the shards are on a local disk."""
        return 0

    def discard(self, file: str) -> None:
        """Delete a shard of the user's, which `--delete-source` asks for."""
        path = self.folder / file
        if path.exists():
            with writing(path):
                path.unlink()
            release_mappings()  # a deleted file takes disk space as long as it is mapped

    def bytes_freed(self, file: str, dst: Path) -> int:
        """The shard's size, if it lies on the disk of `dst`."""
        return self.facts[file].size if self.folder.stat().st_dev == existing_folder(dst).stat().st_dev else 0

    def extra_files(self) -> dict[str, Path]:
        """The files that `is_copied` names, if they are no larger than any such file is."""
        return {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and is_copied(path.name) and path.stat().st_size <= _COPIED_LIMIT_BYTES
        }

    def close(self) -> None:
        """Nothing runs in the background."""


def sample_sha256(path: Path) -> str:
    """SHA-256, hex, of a few blocks spread evenly over the file; weights of another training differ in it."""
    sha256 = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for number in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
                sha256.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return sha256.hexdigest()
