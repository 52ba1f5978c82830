"""Reading safetensors checkpoints: strict headers, memory-mapped tensors.

The `safetensors` library maps and slices tensors too, but it does not say where a tensor lies in its file.
Reading experts from drives needs that, and so does writing them in a given place; so headers are read and
written here. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebox.config import ModelConfig, load_config, read_json
from moebox.errors import CheckpointError
from moebox.units import ceil_div

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_LIMIT_BYTES = 100_000_000
_MAP_NORESERVE = 0x4000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def encode_header(tensors: Iterable[TensorSpec], alignment: int) -> bytes:
    """The beginning of a shard whose data is `tensors` back to back: the length prefix and the JSON header.

    Spaces fill the header up, so that the data starts at a multiple of `alignment` bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(ceil_div(8 + len(text), alignment) * alignment - 8)
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts from the start of `file`, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parse and check one shard's header; no tensor data is read.

    Raises:
        CheckpointError: the file is missing or truncated, the header is not valid, or its offsets
            overlap, leave holes, contradict a shape, or do not end where the file ends.
    """
    return parse_header(path, *read_header_bytes(path))


def read_header_bytes(path: Path) -> tuple[bytes, int]:
    """One shard's header as it stands in the file, without its length prefix, and the file's size.

    Raises:
        CheckpointError: the file is missing, or too short for its header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(path, file.read(8), size)
            return file.read(length), size
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "Fetch the missing shard.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def header_length(path: Path, prefix: bytes, size: int) -> int:
    """Bytes of the header, from the first eight of the file; `CheckpointError` if `size` is too small."""
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes, too short for a safetensors file", _FETCH_AGAIN)
    length: int = struct.unpack("<Q", prefix)[0]
    if length > min(_HEADER_LIMIT_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: header of {length} bytes does not fit the file of {size} bytes", _FETCH_AGAIN
        )
    return length


def parse_header(path: Path, raw: bytes, size: int) -> dict[str, TensorInfo]:
    """Parse and check `raw`, the header of a file of `size` bytes at `path`, without its length prefix.

    Raises:
        CheckpointError: as `read_header`.
    """
    infos = _parse_entries(path, _parse_json(path, raw), data_start=8 + len(raw))
    _check_offsets(path, infos, 8 + len(raw), size)
    return {info.name: info for info in infos}


_FETCH_AGAIN = "The file is truncated or damaged; fetch it again."


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) != len(pairs):
            double = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: header names {double!r} twice", _FETCH_AGAIN)
        return names

    try:
        header = json.loads(raw, object_pairs_hook=refuse_duplicates)
    except ValueError as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}", _FETCH_AGAIN) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a {type(header).__name__}, not an object", _FETCH_AGAIN)
    header.pop("__metadata__", None)
    return header


def _parse_entries(path: Path, header: dict[str, Any], data_start: int) -> list[TensorInfo]:
    infos = []
    for name, entry in header.items():
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            numbers = (begin, end, *shape)
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: {name}: malformed header entry {entry!r}", _FETCH_AGAIN) from None
        if any(not isinstance(number, int) or number < 0 for number in numbers) or end < begin:
            raise CheckpointError(f"{path}: {name}: malformed header entry {entry!r}", _FETCH_AGAIN)
        if dtype not in TORCH_DTYPES:
            raise CheckpointError(f"{path}: {name}: dtype {dtype!r} is not one that moebox reads")
        expected = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        if end - begin != expected:
            raise CheckpointError(
                f"{path}: {name}: {dtype} {list(shape)} takes {expected} bytes, not {end - begin}",
                _FETCH_AGAIN,
            )
        infos.append(TensorInfo(name, dtype, shape, path, data_start + begin, end - begin))
    return infos


def _check_offsets(path: Path, infos: list[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != position:
            what = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {info.name}: offset {info.offset} {what} ({position})", _FETCH_AGAIN
            )
        position += info.nbytes
        if position > size:
            raise CheckpointError(
                f"{path}: {info.name}: ends at byte {position}, the file has {size}", _FETCH_AGAIN
            )
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes behind the last tensor", _FETCH_AGAIN)


@lru_cache(maxsize=256)
def _map_file(path: Path, _identity: tuple[int, int, int]) -> mmap.mmap:
    # The mapping is writable, because torch warns about read-only buffers, and private, so that a write would
    # not reach the file. With NORESERVE the kernel does not count it against its commit limit.
    with path.open("rb") as file:
        return mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )


def map_bytes(info: TensorInfo) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The tensor's bytes as a view of the file's mapping, uint8 [nbytes]. Treat it as read-only.

    Raises:
        CheckpointError: the file has shrunk or vanished since its header was read.
    """
    try:
        status = info.file.stat()
        if status.st_size < info.offset + info.nbytes:
            raise CheckpointError(f"{info.file}: {info.name}: the file has shrunk to {status.st_size} bytes")
        if not info.nbytes:
            return np.empty(0, np.uint8)
        mapping = _map_file(info.file, (status.st_ino, status.st_mtime_ns, status.st_size))
    except OSError as error:
        raise CheckpointError(f"{info.file}: {info.name}: cannot be mapped: {error.strerror}") from None
    return np.frombuffer(mapping, np.uint8, info.nbytes, info.offset)


def open_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor on the file's mapping, without a copy. Treat it as read-only."""
    dtype = TORCH_DTYPES[info.dtype]
    data = map_bytes(info)
    if info.offset % dtype.itemsize:  # torch refuses views that are not aligned to their element
        data = data.copy()
    return (
        torch.from_numpy(data).view(dtype).view(info.shape)
        if info.nbytes
        else torch.empty(info.shape, dtype=dtype)
    )


def release_mappings() -> None:
    """Drop the cached mappings; a mapping that no tensor uses is unmapped."""
    _map_file.cache_clear()


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from the index or from the single shard's header.

    Raises:
        CheckpointError: there is no checkpoint in `folder`, or its index is malformed.
    """
    index_path = folder / INDEX_FILE
    if index_path.exists():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_path}: has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index_path}: {name}: shard {file!r} is not a file name")
        return weight_map
    if (folder / SINGLE_FILE).exists():
        return dict.fromkeys(read_header(folder / SINGLE_FILE), SINGLE_FILE)
    raise CheckpointError(
        f"{folder}: no {INDEX_FILE} and no {SINGLE_FILE}", "Give the folder of a safetensors checkpoint."
    )


def find_shards(folder: Path, stores: Sequence[Path], files: Iterable[str]) -> dict[str, list[Path]]:
    """The copies of each shard, in the checkpoint's `folder` and in `stores`: file name -> paths.

    Raises:
        CheckpointError: a store is no folder; a shard is nowhere; two copies differ in size or header.
    """
    for store in stores:
        if not store.is_dir():
            raise CheckpointError(f"{store}: no such folder", "Give --store folders that hold shards.")
    shards = {}
    for file in files:
        paths = [path for place in dict.fromkeys([folder, *stores]) if (path := place / file).exists()]
        if not paths and stores:
            raise CheckpointError(
                f"{folder / file}: no such file, nor in any --store", "Fetch the missing shard."
            )
        shards[file] = paths or [folder / file]
        _check_copies(paths)
    return shards


def _check_copies(paths: Sequence[Path]) -> None:
    if len(paths) < 2:
        return
    first = read_header_bytes(paths[0])
    for path in paths[1:]:
        if read_header_bytes(path) != first:
            raise CheckpointError(
                f"{path}: differs from {paths[0]} in its size or header", "Copy the shard again."
            )


class Checkpoint:
    """A folder with `config.json` and safetensors shards, all headers checked.

    Attributes:
        folder: the checkpoint's folder.
        config: its parsed `config.json`.
        tensors: every tensor that the index names, in the first copy of its shard.
        stores: other folders that hold shards.
        shards: file name -> its copies, the folder's own first.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        tensors: dict[str, TensorInfo],
        stores: Sequence[Path] = (),
        shards: Mapping[str, list[Path]] | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self.stores = tuple(stores)
        self.shards = dict(shards or {info.file.name: [info.file] for info in tensors.values()})

    @classmethod
    def open(cls, folder: Path, stores: Sequence[Path] = ()) -> Checkpoint:
        """Read the config, the index and every shard's header.

        Args:
            stores: more folders with shards: copies of those in `folder`, or shards that it lacks.

        Raises:
            ConfigError: no usable `config.json`.
            CheckpointError: a shard is missing or damaged, or lacks a tensor that the index puts there;
                two copies of a shard differ.
        """
        config = load_config(folder)
        weight_map = read_index(folder)
        shards = find_shards(folder, stores, sorted(set(weight_map.values())))
        headers = {file: read_header(paths[0]) for file, paths in shards.items()}
        tensors = {}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(
                    f"{shards[file][0]}: {name}: the index puts it here, the header lacks it"
                )
            tensors[name] = headers[file][name]
        return cls(folder, config, tensors, stores, shards)

    def info(self, name: str) -> TensorInfo:
        """Where `name` lies; `CheckpointError` if the checkpoint has no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: {name}: no such tensor in the checkpoint")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor on its file's mapping, without a copy. Treat it as read-only."""
        return open_tensor(self.info(name))
