"""Where source shards come from: a folder here, or the hub (`hub.py`). Headers first, data when asked.

Every header is copied to `DST/.moebox/headers/` where shards may vanish (hub, `--delete-source`), so a
resumed run knows the whole source though parts of it are gone.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from moebox.config import CONFIG_FILE, read_json
from moebox.errors import CheckpointError, MoeboxError
from moebox.files import existing_folder, replace_file, writing
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

HEADER_FOLDER = "headers"
SAMPLES, SAMPLE_BYTES = 8, 4096

TOKENIZER_FILES = (
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
COPIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "THIRD_PARTY")
COPIED_LIMIT_BYTES = 256 << 20


class InterruptedFetchError(MoeboxError):
    """A download was told to stop; never shown."""


@dataclass(frozen=True)
class FileFacts:
    """What tells one version of a source shard from another.

    `stamp` is the modification time of a local file in nanoseconds, or the hub's ETag; `sample_sha256`
    hashes a few blocks spread over a local file ("" on the hub, where the commit says it all).
    """

    size: int
    header_sha256: str
    sample_sha256: str
    stamp: str

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def content(self) -> dict[str, Any]:
        """For the manifest: what does not depend on when the file came here."""
        return {name: value for name, value in asdict(self).items() if value and name != "stamp"}


class Source(Protocol):
    """A checkpoint to be quantized.

    Attributes:
        name: the folder's name or the hub id; goes into the manifest.
        revision: the hub's commit, "" for a folder.
        config: `config.json` as it stands.
        weight_map: tensor name -> shard file.
        facts: shard file -> its identity.
        headers: shard file -> its tensors, with the path at which `fetch` puts them.
        is_local: the shards are the user's own.
    """

    name: str
    revision: str
    config: dict[str, Any]
    weight_map: dict[str, str]
    facts: dict[str, FileFacts]
    headers: dict[str, dict[str, TensorInfo]]
    is_local: bool

    def fetch(self, files: Iterable[str], meter: Meter, stop: threading.Event) -> None:
        """Return once all `files` are here; raises `InterruptedFetchError` when `stop` is set."""

    def prefetch(self, files: Iterable[str]) -> None:
        """Say which files come next; may be fetched in the background."""

    def bytes_to_fetch(self, files: Iterable[str]) -> int:
        """Disk space that fetching `files` takes."""

    def discard(self, file: str) -> None:
        """Delete a shard, if it is there."""

    def bytes_freed(self, file: str, dst: Path) -> int:
        """Disk space that `discard` gives back to the disk of `dst`."""

    def extra_files(self) -> dict[str, Path]:
        """Tokenizer, template, generation and licence files: name -> path."""

    def close(self) -> None:
        """Stop what runs in the background."""


class HeaderStore:
    """Copies of headers (length-prefixed by the file's size), one file per shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, file: str, raw: bytes, size: int) -> None:
        """Keep `raw`, the header of a shard of `size` bytes."""
        path = self._folder / file
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, struct.pack("<Q", size) + raw)

    def load(self, file: str) -> tuple[bytes, int] | None:
        """The kept header and the size of its file, None where there is none."""
        path = self._folder / file
        if not path.exists():
            return None
        data = path.read_bytes()
        return data[8:], struct.unpack("<Q", data[:8])[0]


def sample_sha256(path: Path) -> str:
    """SHA-256 of `SAMPLES` blocks spread evenly over the file: cheap, and no two trainings share it."""
    sha256 = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            for number in range(SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * number // (SAMPLES - 1))
                sha256.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return sha256.hexdigest()


def is_copied(name: str) -> bool:
    """Whether a source's small file belongs to the output; remote code and READMEs do not."""
    return name in TOKENIZER_FILES or name.upper().startswith(COPIED_PREFIXES)


class FolderSource:
    """A checkpoint in a local folder."""

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
            store: where an earlier run kept headers.
            facts: shards as an earlier run saw them; one that is gone is known from `store`.
            keep_headers: put headers into `store`, since shards may vanish before the end.

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
        """Check that `files` are still there."""
        for file in files:
            path = self.folder / file
            if not path.exists():
                raise CheckpointError(f"{path}: no such file", "Fetch the missing shard.")
            if path.stat().st_size != self.facts[file].size:
                raise CheckpointError(
                    f"{path}: changed while it was being quantized", "Start over with --no-resume."
                )

    def prefetch(self, files: Iterable[str]) -> None:
        """Nothing to do: the data is here."""

    def bytes_to_fetch(self, files: Iterable[str]) -> int:
        """None: the data is here."""
        return 0

    def discard(self, file: str) -> None:
        """Delete the user's shard, as `--delete-source` asks."""
        path = self.folder / file
        if path.exists():
            with writing(path):
                path.unlink()
            release_mappings()  # a mapped file keeps its disk space

    def bytes_freed(self, file: str, dst: Path) -> int:
        """The shard's size, if it lies on the disk of `dst`."""
        return self.facts[file].size if self.folder.stat().st_dev == existing_folder(dst).stat().st_dev else 0

    def extra_files(self) -> dict[str, Path]:
        """Tokenizer, template, generation and licence files."""
        return {
            path.name: path
            for path in sorted(self.folder.iterdir())
            if path.is_file() and is_copied(path.name) and path.stat().st_size <= COPIED_LIMIT_BYTES
        }

    def close(self) -> None:
        """Nothing runs in the background."""
