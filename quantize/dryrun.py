"""`moebox quantize --dry-run`: sizes, time and room, before anything is written."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moebox.config import ModelConfig
from moebox.errors import CheckpointError
from moebox.files import free_bytes
from moebox.offload.checkpoint.safetensors import TensorInfo
from moebox.quantize.int4 import quantize_int4
from moebox.quantize.output.journal import WORK_FOLDER, Journal
from moebox.quantize.output.shards import SHARD_BYTES
from moebox.quantize.page_cache import drop_cache
from moebox.quantize.pipeline import Model, open_shards
from moebox.quantize.prepare import (
    default_workers,
    destination_state,
    disk_peak,
    effective_method,
    left_out,
    load_model,
    open_source,
)
from moebox.quantize.progress import format_bytes, format_seconds
from moebox.quantize.source.formats import read_expert

_READ_SAMPLE_BYTES = 256 << 20
_HASH_SAMPLE_BYTES = 32 << 20
_CHUNK_BYTES = 8 << 20

_BACKBONE_PARTS = (
    ("shared experts", ".mlp.shared_experts."),
    ("routers", ".mlp.gate."),
    ("attention", ".self_attn."),
    ("dense layers", ".mlp."),
    ("embeddings and head", "embed_tokens"),
    ("embeddings and head", "lm_head"),
    ("norms", "norm"),
)


@dataclass(frozen=True)
class Speeds:
    """GB/s as measured just now; `read` is None where the source is on the hub."""

    read_gbps: float | None
    kernel_gbps: float
    """Source bytes of experts that one thread quantizes."""
    sha256_gbps: float


@dataclass(frozen=True)
class PlanReport:
    """What a conversion will do. Sizes in bytes."""

    source: str
    destination: str
    method: str
    moe_layers: int
    experts_per_layer: int
    source_bytes: int
    source_experts_bytes: int
    output_bytes: int
    experts_bytes: int
    backbone_bytes: int
    shards: int
    shards_finished: int
    kept_bf16: dict[str, int]
    """Part of the backbone -> its bytes in the output; all bf16, the routers' correction biases F32."""
    left_out: list[str]
    needed_bytes: int
    free_bytes: int
    workers: int
    speeds: Speeds
    seconds: float
    arithmetic: list[str]

    @property
    def fits(self) -> bool:
        """Whether the destination has room."""
        return self.needed_bytes <= self.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"fits": self.fits}


def plan(
    src: Path | str,
    dst: Path | str,
    *,
    method: str = "rtn",
    workers: int | None = None,
    delete_source: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> PlanReport:
    """Check `src` and foretell `quantize(src, dst, ...)`; writes nothing to either.

    Reads all headers, up to 256 MB of the source to time its disk, and one expert to time the kernel. Of
    a hub id only headers and small files are fetched, into a temporary folder; its network is not timed.

    Raises:
        CheckpointError, ConfigError: as `quantize`.
    """
    dst = Path(dst)
    state, journal = destination_state(dst), Journal(dst)
    if state == "complete":
        raise CheckpointError(f"{dst}: is complete already", "Look at it with `moebox inspect`.")
    if state == "started":
        journal.load()
    with tempfile.TemporaryDirectory() as scratch:
        begun = state == "started" and Path(src).exists()
        work = (dst if begun else Path(scratch)) / WORK_FOLDER
        source = open_source(src, work, journal.header if begun else None, keep_headers=not begun)
        try:
            model, config = load_model(source, shard_bytes)
            workers = default_workers(config, workers)
            speeds = measure(model, config)
            return _report(
                model,
                config,
                dst,
                method,
                finished=set(journal.shards),
                workers=workers,
                speeds=speeds,
                delete_source=delete_source,
            )
        finally:
            source.close()


def _report(
    model: Model,
    config: ModelConfig,
    dst: Path,
    method: str,
    *,
    finished: set[str],
    workers: int,
    speeds: Speeds,
    delete_source: bool,
) -> PlanReport:
    todo = [shard for shard in model.shards if shard.file not in finished]
    output_bytes = sum(shard.size for shard in model.shards)
    kept = _kept(model)
    seconds, arithmetic = estimate(
        read_bytes=sum(model.source_bytes(shard) for shard in todo),
        expert_bytes=sum(_expert_source_bytes(model, shard.experts) for shard in todo),
        output_bytes=sum(shard.size for shard in todo),
        workers=workers,
        speeds=speeds,
    )
    return PlanReport(
        source=model.source.name,
        destination=str(dst),
        method=effective_method(model, method),
        moe_layers=len(config.moe_layers),
        experts_per_layer=config.n_routed_experts,
        source_bytes=sum(facts.size for facts in model.source.facts.values()),
        source_experts_bytes=_expert_source_bytes(model, model.inventory.experts),
        output_bytes=output_bytes,
        experts_bytes=config.experts_bytes,
        backbone_bytes=sum(kept.values()),
        shards=len(model.shards),
        shards_finished=len(finished),
        kept_bf16=kept,
        left_out=left_out(model),
        needed_bytes=disk_peak(model, dst, finished, open_shards(workers), delete_source=delete_source),
        free_bytes=free_bytes(dst),
        workers=workers,
        speeds=speeds,
        seconds=seconds,
        arithmetic=arithmetic,
    )


def _expert_source_bytes(model: Model, experts: Iterable[tuple[int, int]]) -> int:
    return sum(info.nbytes for key in experts for info in _expert_infos(model, key))


def _expert_infos(model: Model, key: tuple[int, int]) -> list[TensorInfo]:
    return [model.infos[name] for tensor in model.inventory.experts[key] for name in tensor.parts.values()]


def _kept(model: Model) -> dict[str, int]:
    kept: dict[str, int] = {}
    backbone = model.inventory.backbone
    for shard in model.shards:
        for tensor in shard.tensors():
            if tensor.name in backbone:
                part = next(part for part, mark in _BACKBONE_PARTS if mark in tensor.name)
                kept[part] = kept.get(part, 0) + tensor.nbytes
    return kept


def estimate(
    *, read_bytes: int, expert_bytes: int, output_bytes: int, workers: int, speeds: Speeds
) -> tuple[float, list[str]]:
    """Seconds for a conversion, and how they come about: the slower of disk and processor.

    The destination is taken to write as fast as the source reads, on the same disk.
    """
    cpu_s = (expert_bytes / speeds.kernel_gbps + output_bytes / speeds.sha256_gbps) / workers / 1e9
    lines = [
        f"processor: ({format_bytes(expert_bytes)} of experts / {speeds.kernel_gbps:.2f} GB/s a thread + "
        f"{format_bytes(output_bytes)} / {speeds.sha256_gbps:.2f} GB/s of SHA-256) / {workers} threads "
        f"= {format_seconds(cpu_s)}"
    ]
    if speeds.read_gbps is None:
        lines.append("network: not measured; the source comes from the hub")
        return cpu_s, lines
    disk_s = (read_bytes + output_bytes) / speeds.read_gbps / 1e9
    lines.append(
        f"disk: ({format_bytes(read_bytes)} read + {format_bytes(output_bytes)} written) / "
        f"{speeds.read_gbps:.2f} GB/s = {format_seconds(disk_s)}"
    )
    return max(cpu_s, disk_s), lines


def measure(model: Model, config: ModelConfig) -> Speeds:
    """Time the source's disk, the kernel on one thread, and SHA-256."""
    local = model.source.is_local
    key = next(iter(model.inventory.experts))
    return Speeds(
        _read_gbps(model.infos.values()) if local else None,
        _kernel_gbps(model, key) if local else _kernel_gbps_random(config),
        _sha256_gbps(),
    )


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
    return done / elapsed / 1e9


def _kernel_gbps(model: Model, key: tuple[int, int]) -> float:
    nbytes = sum(info.nbytes for info in _expert_infos(model, key))
    return _fastest(nbytes, lambda: read_expert(model.inventory.experts[key], model.infos))


def _kernel_gbps_random(config: ModelConfig) -> float:
    rows, columns = config.expert_shapes()["gate_proj"]
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale_inv = torch.ones(-(-rows // 128), -(-columns // 128))
    return _fastest(weight.numel(), lambda: quantize_int4(weight, scale_inv))


def _fastest(nbytes: int, work: Any, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):  # the first touch reads from the disk
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(nbytes / min(times) / 1e9)


def _sha256_gbps() -> float:
    data = bytes(_HASH_SAMPLE_BYTES)
    return _fastest(len(data), lambda: hashlib.sha256(data).digest(), repeats=2)


def render_plan(report: PlanReport, console: Console) -> None:
    """Print `report` on `console`."""
    table = Table.grid(padding=(0, 2))
    for name, value in _rows(report):
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)


def _rows(report: PlanReport) -> list[tuple[str, str]]:
    experts = report.moe_layers * report.experts_per_layer
    rows = [
        (
            "source",
            f"{report.source}: {format_bytes(report.source_bytes)}, "
            f"experts {format_bytes(report.source_experts_bytes)}",
        ),
        ("output", f"{report.destination}: {format_bytes(report.output_bytes)}, shards: {report.shards}"),
        (
            "experts",
            f"{experts} in {report.moe_layers} layers, {report.method}: {format_bytes(report.experts_bytes)}",
        ),
        ("left in bf16", f"{format_bytes(report.backbone_bytes)}: {_parts(report.kept_bf16)}"),
    ]
    if report.left_out:
        rows.append(("left out", ", ".join(report.left_out)))
    if report.shards_finished:
        rows.append(("finished", f"{report.shards_finished} of {report.shards} shards by an earlier run"))
    verdict = "fits" if report.fits else "does NOT fit"
    rows.append(
        (
            "disk",
            f"{format_bytes(report.needed_bytes)} needed, {format_bytes(report.free_bytes)} free: {verdict}",
        )
    )
    rows.append(("time", f"about {format_seconds(report.seconds)}, the slower of"))
    return rows + [("", line) for line in report.arithmetic]


def _parts(kept: dict[str, int]) -> str:
    return ", ".join(f"{part} {format_bytes(nbytes)}" for part, nbytes in kept.items())
