"""A source on the Hugging Face hub, fetched shard by shard into `DST/source/`.

Metadata and transport are huggingface_hub's, so that HF_ENDPOINT, HF_TOKEN, proxies and offline mode have
their usual effect. Shards, however, are fetched by its `http_get` into `.part` files: since version 1 the
library's download into a folder starts over after a kill, which would lose up to 16 GB of a shard. The
revision is pinned when a conversion starts. Headers are read by range requests before the first shard is
fetched, so that a broken checkpoint is refused before hundreds of gigabytes are downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but exported lazily
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from moebox.config import CONFIG_FILE, read_json
from moebox.errors import CheckpointError
from moebox.files import writing
from moebox.offload.checkpoint.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    header_length,
    parse_header,
    read_index,
    release_mappings,
)
from moebox.quantize.progress import Meter
from moebox.quantize.source.base import FileFacts, HeaderStore, InterruptedFetchError, is_copied

SOURCE_FOLDER = "source"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HEADER_REQUESTS = 8
_DOWNLOADS = 2
_RETRIES = 4
# The HTTP library's own base class: httpx in huggingface_hub 1, httpx2 in 2.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]
log = logging.getLogger("moebox")


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """`org/name`, `org/name@revision`, with or without `hf://` -> (id, revision); None for anything else."""
    bare = text.removeprefix("hf://")
    repo, _, revision = bare.partition("@")
    if not _HUB_ID.fullmatch(repo):
        if bare != text:
            raise CheckpointError(f"{text}: not a hub id", "Give it as hf://organisation/model.")
        return None
    return repo, revision or None


class _SilentBar:
    """Replaces tqdm in huggingface_hub: calls `on_bytes`, which counts, and raises to end a download."""

    def __init__(self, *_args: object, on_bytes: Any = None, **_options: object) -> None:
        self._on_bytes = on_bytes

    def update(self, nbytes: float = 1) -> None:
        if self._on_bytes is not None:
            self._on_bytes(int(nbytes))

    def close(self) -> None:
        pass

    def __enter__(self) -> _SilentBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class HubSource:
    """A checkpoint on the hub at one commit; shards are fetched into `folder` when they are asked for.

    Shards that are in huggingface_hub's cache already are read from there and never deleted.
    """

    is_local = False

    def __init__(
        self,
        repo: str,
        revision: str | None,
        folder: Path,
        store: HeaderStore,
        facts: dict[str, FileFacts] | None = None,
    ) -> None:
        """Look the model up on the hub, and fetch its small files and all headers.

        Args:
            repo: `organisation/name`.
            revision: branch, tag or commit; None is the default branch.
            folder: where files are put.
            store: where headers are kept.
            facts: the shards as an earlier run found them at commit `revision`; they save the look-up.

        Raises:
            CheckpointError: no connection, no such model, no access, or a damaged checkpoint.
        """
        self.name, self.folder, self._store = repo, folder, store
        with _hub_errors(repo):
            self._look_up(revision, facts)
            self._fetch_small_files()
        self.config = read_json(folder / CONFIG_FILE)
        indexed = (folder / INDEX_FILE).exists()
        files = sorted(set(read_index(folder).values())) if indexed else [SINGLE_FILE]
        self.facts: dict[str, FileFacts] = {}
        self.headers: dict[str, dict[str, TensorInfo]] = {}
        self._paths = {file: self._path(file) for file in files}
        with ThreadPoolExecutor(_HEADER_REQUESTS) as pool:
            for file, (raw, size, stamp) in zip(files, pool.map(self._header, files), strict=True):
                self.facts[file] = FileFacts(size, hashlib.sha256(raw).hexdigest(), "", stamp)
                self.headers[file] = parse_header(self._paths[file], raw, size)
        self.weight_map = (
            read_index(folder) if indexed else dict.fromkeys(self.headers[SINGLE_FILE], SINGLE_FILE)
        )
        self._stop = threading.Event()
        self._meter: Meter | None = None
        self._pool = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="fetch")
        self._jobs: dict[str, Future[None]] = {}

    def _look_up(self, revision: str | None, facts: dict[str, FileFacts] | None) -> None:
        if facts is not None and revision is not None and (self.folder / CONFIG_FILE).exists():
            self.revision = revision
            self._listed = {file: (fact.size, fact.stamp) for file, fact in facts.items()}
            self._small = [
                path.name for path in self.folder.iterdir() if path.is_file() and _is_small(path.name)
            ]
            return
        info = HfApi().model_info(self.name, revision=revision, files_metadata=True)
        self.revision = info.sha or ""
        siblings = info.siblings or []
        self._listed = {
            item.rfilename: (item.size or 0, item.lfs.sha256 if item.lfs else item.blob_id or "")
            for item in siblings
        }
        self._small = [item.rfilename for item in siblings if _is_small(item.rfilename)]
        if CONFIG_FILE not in self._small:
            raise CheckpointError(f"{self.name}: has no {CONFIG_FILE}", "Give the id of a safetensors model.")

    def _fetch_small_files(self) -> None:
        for name in self._small:
            hf_hub_download(
                self.name,
                name,
                revision=self.revision,
                local_dir=self.folder,
                tqdm_class=cast(Any, _SilentBar),
            )

    def _path(self, file: str) -> Path:
        if file not in self._listed:
            raise CheckpointError(f"{self.name}: {file}: named in the index, missing on the hub")
        cached = try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else self.folder / file

    def _header(self, file: str) -> tuple[bytes, int, str]:
        size, stamp = self._listed[file]
        kept = self._store.load(file)
        if kept is not None and kept[1] == size:
            return *kept, stamp
        with _hub_errors(f"{self.name}: {file}"):
            prefix = self._range(file, 0, 8)
            length = header_length(self._paths[file], prefix, size)
            raw = self._range(file, 8, length)
        self._store.save(file, raw, size)
        return raw, size, stamp

    def _range(self, file: str, begin: int, nbytes: int) -> bytes:
        headers = build_hf_headers() | {"Range": f"bytes={begin}-{begin + nbytes - 1}"}
        url = hf_hub_url(self.name, file, revision=self.revision)
        data = b""
        with http_stream_backoff("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            skip = begin if response.status_code == 200 else 0  # a server that ignores ranges
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + nbytes:
                    break
        return data[skip : skip + nbytes]

    def fetch(self, files: Iterable[str], meter: Meter, stop: threading.Event) -> None:
        """Return once all `files` are on a local disk, and report meanwhile."""
        self._meter = meter
        self.prefetch(files)
        for file in files:
            while not wait([self._jobs[file]], timeout=0.2).done:
                meter.touch("fetch")
                if stop.is_set():
                    raise InterruptedFetchError("fetch stopped")
            self._jobs[file].result()

    def prefetch(self, files: Iterable[str]) -> None:
        """Fetch `files` in the background, in this order."""
        for file in files:
            if file not in self._jobs:
                self._jobs[file] = self._pool.submit(self._download, file)

    def bytes_to_fetch(self, files: Iterable[str]) -> int:
        """Bytes of `files` that are in neither `folder` nor the hub's cache, less those of `.part` files."""
        missing = 0
        for file in files:
            if not self._paths[file].exists():
                part = _part_path(self._paths[file])
                missing += self.facts[file].size - (part.stat().st_size if part.exists() else 0)
        return missing

    def _download(self, file: str) -> None:
        path, facts = self._paths[file], self.facts[file]
        if path.exists():
            if path.stat().st_size == facts.size:
                return
            path.unlink()
        part = _part_path(path)
        with writing(part), _hub_errors(f"{self.name}: {file}"):
            resumed = self._stream_patiently(file, part, facts.size)
            if resumed and len(facts.stamp) == 64:
                self._verify(part, facts.stamp)
            part.replace(path)

    def _stream_patiently(self, file: str, part: Path, size: int) -> bool:
        """Fetch into `part`; True if an earlier attempt had fetched a part of it.

        `http_get` resumes after some faults of the connection, this method after all, until several attempts
        in a row bring no byte.
        """
        resumed, failures, last_bytes = False, 0, -1
        while True:
            try:
                return self._stream(file, part, size) or resumed
            except _TransportError as error:
                have = part.stat().st_size if part.exists() else 0
                failures = 0 if have > last_bytes else failures + 1
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
                if refused or failures >= _RETRIES:
                    raise
                resumed, last_bytes = True, have
                log.info("%s: %s: %s; resuming at byte %d", self.name, file, error, have)
                self._stop.wait(1.0 + failures)

    def _stream(self, file: str, part: Path, size: int) -> bool:
        url = hf_hub_url(self.name, file, revision=self.revision)
        metadata = get_hf_file_metadata(url)
        headers = build_hf_headers()
        if not metadata.location.startswith(url.partition("/" + self.name)[0]):
            headers.pop("authorization", None)  # a signed CDN address
        part.touch()
        with part.open("r+b") as target:
            have = target.seek(0, 2)
            if have > size:
                have = target.truncate(0)
                target.seek(0)
            http_get(
                metadata.location,
                target,
                resume_size=have,
                headers=headers,
                expected_size=size,
                tqdm_class=cast(Any, partial(_SilentBar, on_bytes=self._count)),
            )
        return have > 0

    def _count(self, nbytes: int) -> None:
        if self._stop.is_set():
            raise InterruptedFetchError("fetch stopped")
        if self._meter is not None:
            self._meter.add_fetched(nbytes)

    def _verify(self, part: Path, sha256: str) -> None:
        """Check a file that several attempts have fetched in pieces."""
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise CheckpointError(
                f"{part}: SHA-256 is {found}, the hub says {sha256}",
                "Run the same command again to fetch it anew.",
            )

    def discard(self, file: str) -> None:
        """Delete a fetched shard; a shard in the hub's cache stays."""
        path = self._paths[file]
        if path.parent == self.folder and path.exists():
            with writing(path):
                path.unlink()
            release_mappings()  # a deleted file takes disk space as long as it is mapped

    def bytes_freed(self, file: str, dst: Path) -> int:
        """The shard's size, or 0 where it is in the hub's cache."""
        return self.facts[file].size if self._paths[file].parent == self.folder else 0

    def extra_files(self) -> dict[str, Path]:
        return {name: self.folder / name for name in sorted(self._small) if is_copied(name)}

    def close(self) -> None:
        """Stop downloads; `.part` files stay, so that the next run continues them."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _is_small(name: str) -> bool:
    return name in (CONFIG_FILE, INDEX_FILE) or ("/" not in name and is_copied(name))


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Raise a `CheckpointError` that says what to do for each error of the hub library."""
    try:
        yield
    except GatedRepoError:
        fix = "Accept the model's terms on its page, then set HF_TOKEN or run `hf auth login`."
        raise CheckpointError(f"{what}: access to this model is restricted", fix) from None
    except RepositoryNotFoundError:
        fix = "Check the spelling; for a private model set HF_TOKEN. A folder must exist to be taken as one."
        raise CheckpointError(f"{what}: no such model on the hub, and no such folder", fix) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{what}: no such revision on the hub") from None
    except HFValidationError as error:
        raise CheckpointError(f"{what}: not a hub id: {error}") from None
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{what}: HF_HUB_OFFLINE is set", "Unset it, or give a local folder.") from None
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise CheckpointError(f"{what}: the hub refused: {str(error).splitlines()[0]}", _AGAIN) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise CheckpointError(f"{what}: {error}", _AGAIN) from None
    except _TransportError as error:
        raise CheckpointError(f"{what}: the hub cannot be reached: {error}", _AGAIN) from None


_AGAIN = "Check the connection and run the same command again: what has been fetched is kept."


def remove_fetched(dst: Path) -> None:
    """Delete `DST/source`."""
    shutil.rmtree(dst / SOURCE_FOLDER, ignore_errors=True)
