"""`moebox synth`: random checkpoints of a true shape, written about as fast as the disk takes them.

Values come from pools of random bytes, one pool per `fill` and `std`. Tensors read their pool one after the
other; at its end they go on at its beginning. The lengths of pool and tensors have no large common factor,
so that no two experts are equal. Magnitudes keep a forward pass finite: matrices about N(0, 1/in), norms
about 1.
"""

from __future__ import annotations

import json
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from moebox.config import CONFIG_FILE
from moebox.errors import CheckpointError, PlanError
from moebox.files import free_bytes
from moebox.offload.checkpoint.safetensors import INDEX_FILE, TORCH_DTYPES, encode_header
from moebox.quantize.synth import Format, Shape
from moebox.quantize.synth.shapes import SynthTensor, synth_config, synth_tensors

Progress = Callable[[int, int], None]

SHARD_BYTES = 4 << 30
POOL_BYTES = 128 << 20
_CHUNK_BYTES = 16 << 20
_WRITERS = 4
_ALIGNMENT = 8


@dataclass(frozen=True)
class SynthResult:
    """What `synth` wrote; `nbytes` counts tensor data."""

    folder: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """The figures of `render`, for JSON."""
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "elapsed_s": self.elapsed_s,
            "write_gbps": self.nbytes / self.elapsed_s / 1e9,
        }

    def render(self) -> str:
        """As one line of text."""
        return (
            f"{self.folder}: {self.tensors:,} tensors, {self.nbytes / 1e9:.3g} GB "
            f"in {len(self.files)} files, written at {self.nbytes / self.elapsed_s / 1e9:.2f} GB/s"
        )


def synth(
    dst: Path | str,
    shape: Shape = "kimi-k2",
    *,
    layers: int | None = None,
    experts: int | None = None,
    format: Format = "fp8",
    seed: int = 0,
    config_overrides: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> SynthResult:
    """Write a random checkpoint of a true shape into the folder `dst`, the same for the same arguments.

    Args:
        dst: a folder that does not exist or is empty.
        shape: `kimi-k2`, or `tiny`, which is the same architecture in about a megabyte.
        layers: all layers, the dense ones first; the shape's own count by default.
        experts: routed experts per layer; the shape's own count by default.
        format: `fp8` as Kimi-K2-Instruct, `bf16`, or `int4` as Kimi-K2-Thinking (experts only).
        seed: of every value.
        config_overrides: keys of `config.json` to replace. With `model_type` `kimi_k25` the config is
            nested in `text_config`, names get the `language_model.` prefix and a few vision tensors.
        shard_bytes: limit of a file's data; a single tensor may exceed it. An expert may span two files.
        progress: called with bytes written and bytes in all.

    Raises:
        ConfigError: the arguments contradict each other.
        CheckpointError: `dst` holds something already, or cannot be written.
        PlanError: the disk has less free space than the checkpoint takes.
    """
    start = time.monotonic()
    dst = Path(dst)
    raw = synth_config(shape, layers=layers, experts=experts, format=format, overrides=config_overrides)
    tensors = synth_tensors(raw, format)
    shards = _name_shards(_split(tensors, shard_bytes), format)
    total = sum(tensor.nbytes for tensor in tensors)
    _check_destination(dst, total)
    created = not dst.exists()
    written: list[Path] = []
    with ExitStack() as undo:  # on an error or an interrupt
        undo.callback(_remove, written, dst if created else None)
        try:
            dst.mkdir(parents=True, exist_ok=True)
            written += [dst / file for file in shards]
            _write_shards(dst, shards, _Pools(tensors, seed), _Meter(total, progress))
            for file, content in _json_files(raw, shards, total).items():
                written.append(dst / file)
                (dst / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{dst}: cannot be written: {error.strerror or error}") from error
        undo.pop_all()
    return SynthResult(dst, tuple(shards), len(tensors), total, time.monotonic() - start)


_FP8_STD = 106.0  # e4m3 ends at 448: about 4.2 std, the largest of a block's 16,384 normal values
_INT4_STD = 3.0  # INT4 ends at 7: likewise for a group's 32 values


def _normal(count: int) -> torch.Tensor:
    """`count` quantiles of N(0, 1), symmetric, as float64."""
    quantiles: torch.Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return quantiles


def _table(fill: str, std: float) -> np.ndarray[Any, Any]:
    """The 65,536 equally likely values of a pool, as integers of the elements' width, or as float32."""
    normal = _normal(1 << 16)
    if fill == "fp8":
        return (normal * _FP8_STD).float().to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    if fill == "nibbles":
        nibbles = (_normal(256) * _INT4_STD).round().clamp(-8, 7).to(torch.int64) + 8
        return (nibbles[:, None] * 16 + nibbles).flatten().to(torch.uint8).numpy()
    if fill == "bias":
        return (normal * 0.01).float().numpy()
    if fill == "scale_inv":
        return (torch.exp(normal * 0.1) * (std / _FP8_STD)).float().numpy()
    values = {
        "normal": normal * std,
        "norm": 1 + normal * 0.02,
        "scale": torch.exp(normal * 0.2) * (std / _INT4_STD),
    }[fill]
    return values.float().to(torch.bfloat16).view(torch.int16).numpy()


class _Pools:
    """Random bytes per (fill, std), which the tensors read in turn, again and again."""

    def __init__(self, tensors: list[SynthTensor], seed: int) -> None:
        self._seed = seed
        self._starts: dict[str, int] = {}
        self._needed: dict[tuple[str, float], int] = {}
        for tensor in tensors:
            key = (tensor.fill, tensor.std)
            self._starts[tensor.name] = self._needed.get(key, 0)
            self._needed[key] = self._starts[tensor.name] + tensor.nbytes
        self._pools: dict[tuple[str, float], memoryview] = {}
        self._lock = threading.Lock()

    def stream(self, tensor: SynthTensor) -> Iterator[memoryview]:
        """The tensor's bytes, in pieces."""
        if tensor.fill.startswith("shape:"):
            yield memoryview(struct.pack("<2i", *map(int, tensor.fill.split(":")[1:])))
            return
        key, left = (tensor.fill, tensor.std), tensor.nbytes
        with self._lock:
            pool = self._pools.get(key) or self._pools.setdefault(key, self._make(key))
        position = self._starts[tensor.name] % len(pool)
        while left:
            piece = pool[position : position + min(left, _CHUNK_BYTES)]
            yield piece
            left -= len(piece)
            position = (position + len(piece)) % len(pool)

    def _make(self, key: tuple[str, float]) -> memoryview:
        table = _table(*key)
        # An odd count has no large common factor with tensor sizes, multiples of large powers of two.
        count = min(self._needed[key], POOL_BYTES) // table.itemsize | 1
        rng = np.random.Generator(np.random.SFC64([self._seed, zlib.crc32(repr(key).encode())]))
        pool = np.empty(count, table.dtype)
        for start in range(0, count, 1 << 22):
            part = pool[start : start + (1 << 22)]
            np.take(table, np.frombuffer(rng.bytes(2 * len(part)), np.uint16), out=part)
        return pool.data.cast("B")


def _split(tensors: list[SynthTensor], shard_bytes: int) -> list[list[SynthTensor]]:
    shards: list[list[SynthTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    # Widest elements first, as the safetensors library writes them, keeps every tensor aligned.
    return [sorted(shard, key=lambda tensor: -TORCH_DTYPES[tensor.dtype].itemsize) for shard in shards]


def _name_shards(shards: list[list[SynthTensor]], format: Format) -> dict[str, list[SynthTensor]]:
    pattern = "model-{}-of-{}" if format == "fp8" else "model-{:05d}-of-{:06d}"
    names = (pattern.format(number, len(shards)) for number in range(1, len(shards) + 1))
    return {f"{name}.safetensors": shard for name, shard in zip(names, shards, strict=True)}


class _Meter:
    """Counts the bytes that were written and reports them, from one thread at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _write_shards(dst: Path, shards: dict[str, list[SynthTensor]], pools: _Pools, meter: _Meter) -> None:
    """Write all shards, several at once; on an error or an interrupt each stops before its next tensor."""
    stop = threading.Event()

    def write(file: str) -> None:
        with (dst / file).open("xb", buffering=0) as shard:
            _write_all(shard, memoryview(encode_header(shards[file], _ALIGNMENT)))
            for tensor in shards[file]:
                if stop.is_set():
                    return
                for piece in pools.stream(tensor):
                    _write_all(shard, piece)
                meter.add(tensor.nbytes)

    with ThreadPoolExecutor(_WRITERS) as executor:
        try:
            futures = [executor.submit(write, file) for file in shards]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)
    for future in futures:
        if not future.cancelled():
            future.result()


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _json_files(
    raw: dict[str, Any], shards: dict[str, list[SynthTensor]], total: int
) -> dict[str, dict[str, Any]]:
    weight_map = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_FILE: index, CONFIG_FILE: raw}


def _check_destination(dst: Path, nbytes: int) -> None:
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst}: exists and is not an empty folder", "Name a new folder.")
    free = free_bytes(dst)
    if free < nbytes * 1.001 + (1 << 20):
        raise PlanError(
            f"{dst}: the checkpoint takes {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free",
            "Ask for fewer layers or experts, or another disk.",
        )


def _remove(files: list[Path], folder: Path | None) -> None:
    for file in files:
        file.unlink(missing_ok=True)
    if folder is not None and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
