"""How fast this machine converts: its disk, the kernel on one thread, SHA-256. For the dry run's estimate."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moebox.config import ModelConfig
from moebox.offload.checkpoint.safetensors import TensorInfo
from moebox.quantize.conversion import Conversion
from moebox.quantize.encodings import FP8_BLOCK
from moebox.quantize.int4 import quantize_int4
from moebox.quantize.page_cache import drop_cache
from moebox.quantize.source.formats import read_expert
from moebox.units import GIGA, ceil_div

_READ_SAMPLE_BYTES = 256 << 20
_HASH_SAMPLE_BYTES = 32 << 20
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Speeds:
    """GB/s, measured just now; `read_gbps` is None where the source is on the hub."""

    read_gbps: float | None
    kernel_gbps: float
    """Source bytes of experts that one thread quantizes."""
    sha256_gbps: float


def measure(conversion: Conversion) -> Speeds:
    """Time the source's disk, the kernel on one thread, and SHA-256."""
    if conversion.source.is_local:
        return Speeds(_read_gbps(conversion.infos.values()), _kernel_gbps(conversion), _sha256_gbps())
    return Speeds(None, _kernel_gbps_random(conversion.config), _sha256_gbps())


def _read_gbps(infos: Iterable[TensorInfo]) -> float:
    done, elapsed = 0, 0.0
    for file in dict.fromkeys(info.file for info in infos):
        drop_cache(file)
        start = time.perf_counter()
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, _READ_SAMPLE_BYTES - done, os.POSIX_FADV_WILLNEED)
            position = 0
            while done < _READ_SAMPLE_BYTES and (chunk := os.pread(descriptor, _CHUNK_BYTES, position)):
                position += len(chunk)
                done += len(chunk)
        finally:
            os.close(descriptor)
        elapsed += time.perf_counter() - start
        if done >= _READ_SAMPLE_BYTES:
            break
    return done / elapsed / GIGA


def _kernel_gbps(conversion: Conversion) -> float:
    key, sources = next(iter(conversion.inventory.experts.items()))
    nbytes = conversion.expert_source_bytes([key])
    return _fastest(nbytes, lambda: read_expert(sources, conversion.infos))


def _kernel_gbps_random(config: ModelConfig) -> float:
    rows, columns = config.expert_shapes()["gate_proj"]
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale_inv = torch.ones(ceil_div(rows, FP8_BLOCK), ceil_div(columns, FP8_BLOCK))
    return _fastest(weight.numel(), lambda: quantize_int4(weight, scale_inv))


def _fastest(nbytes: int, work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):  # the first touch reads from the disk
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return nbytes / min(times) / GIGA


def _sha256_gbps() -> float:
    data = bytes(_HASH_SAMPLE_BYTES)
    return _fastest(len(data), lambda: hashlib.sha256(data).digest(), repeats=2)
