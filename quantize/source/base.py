"""What a conversion asks of a source, whether it is a local folder (`folder.py`) or on the hub (`hub.py`).

A source reads all headers at once, and data only when it is asked for. Where source shards may vanish before
the output is complete (hub, `--delete-source`), a copy of every header is kept in `DST/.moebox/headers/`:
from it a resumed run knows the whole source, although some shards are gone.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from moebox.errors import MoeboxError
from moebox.files import replace_file, writing
from moebox.offload.checkpoint.safetensors import TensorInfo
from moebox.quantize.progress import Meter

HEADER_FOLDER = "headers"

_COPIED_FILES = (
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
_COPIED_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "THIRD_PARTY")


class InterruptedFetchError(MoeboxError):
    """A download was told to stop because the conversion has ended; users never see this error."""


@dataclass(frozen=True)
class FileFacts:
    """What tells one version of a source shard from another.

    Attributes:
        size: bytes of the file.
        header_sha256: SHA-256 of the header, hex.
        sample_sha256: SHA-256 of a few blocks spread over a local file; "" on the hub: `stamp` suffices.
        stamp: modification time of a local file in nanoseconds, or the hub's SHA-256 or blob id.
    """

    size: int
    header_sha256: str
    sample_sha256: str
    stamp: str

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def content(self) -> dict[str, Any]:
        """For the manifest: without `stamp`, which depends on when the file was copied here."""
        return {name: value for name, value in asdict(self).items() if value and name != "stamp"}


class Source(Protocol):
    """A checkpoint to be quantized.

    Attributes:
        name: the folder's name or the hub id; goes into the manifest.
        revision: the hub's commit, "" for a folder.
        config: the object in `config.json`.
        weight_map: tensor name -> shard file.
        facts: shard file -> its identity.
        headers: shard file -> its tensors, with the path at which `fetch` puts them.
        is_local: whether the shards lie in a folder of the user's.
    """

    name: str
    revision: str
    config: dict[str, Any]
    weight_map: dict[str, str]
    facts: dict[str, FileFacts]
    headers: dict[str, dict[str, TensorInfo]]
    is_local: bool

    def fetch(self, files: Iterable[str], meter: Meter, stop: threading.Event) -> None:
        """Return once all `files` are on a local disk; raise `InterruptedFetchError` when `stop` is set."""

    def prefetch(self, files: Iterable[str]) -> None:
        """Start to fetch `files` in the background, in this order, where they are not local."""

    def bytes_to_fetch(self, files: Iterable[str]) -> int:
        """Disk space that fetching `files` takes."""

    def discard(self, file: str) -> None:
        """Delete a shard, if it is there."""

    def bytes_freed(self, file: str, dst: Path) -> int:
        """Disk space that `discard` gives back to the disk of `dst`."""

    def extra_files(self) -> dict[str, Path]:
        """The small files that the output gets a copy of (`is_copied`): name -> path."""

    def close(self) -> None:
        """Stop what runs in the background."""


class HeaderStore:
    """Copies of shard headers, a file for each, which starts with the shard's size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, file: str, raw: bytes, size: int) -> None:
        """Keep `raw`, the header of a shard of `size` bytes."""
        path = self._folder / file
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, struct.pack("<Q", size) + raw)

    def load(self, file: str) -> tuple[bytes, int] | None:
        """The kept header and the size of its shard; None where there is none."""
        path = self._folder / file
        if not path.exists():
            return None
        data = path.read_bytes()
        return data[8:], struct.unpack("<Q", data[:8])[0]


def is_copied(name: str) -> bool:
    """Whether the output gets a copy of a source's small file: tokenizer, template, generation, licence.

    Remote code and READMEs are not copied.
    """
    return name in _COPIED_FILES or name.upper().startswith(_COPIED_PREFIXES)
