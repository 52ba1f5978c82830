"""`moebox quantize --dry-run`: sizes, time and disk space of a conversion, of which nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moebox.errors import CheckpointError
from moebox.files import free_bytes
from moebox.quantize.conversion import Conversion
from moebox.quantize.output.journal import WORK_FOLDER, Journal
from moebox.quantize.output.shards import SHARD_BYTES, Shard
from moebox.quantize.pipeline import open_shards
from moebox.quantize.prepare import (
    default_workers,
    destination_state,
    disk_peak,
    effective_method,
    left_out,
    open_source,
    plan_conversion,
)
from moebox.quantize.speeds import Speeds, measure
from moebox.quantize.text import format_bytes, format_seconds, print_rows
from moebox.units import GIGA

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
    """Part of the backbone -> its bytes in the output: bf16, but F32 for the routers' correction biases."""
    left_out: list[str]
    needed_bytes: int
    free_bytes: int
    workers: int
    speeds: Speeds
    seconds: float
    arithmetic: list[str]

    @property
    def fits(self) -> bool:
        """Whether the destination's disk has enough free space."""
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
    """Check `src` and say what `quantize(src, dst, ...)` would do; nothing is written to either.

    All headers are read, up to 256 MB of the source to time its disk, and one expert to time the kernel. Of
    a hub model only headers and small files are fetched, into a temporary folder; the network is not timed.

    Raises:
        CheckpointError, ConfigError: as `quantize`; also where `dst` is complete.
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
            return _report(
                plan_conversion(source, shard_bytes),
                dst,
                method,
                finished=set(journal.shards),
                workers=workers,
                delete_source=delete_source,
            )
        finally:
            source.close()


def _report(
    conversion: Conversion,
    dst: Path,
    method: str,
    *,
    finished: set[str],
    workers: int | None,
    delete_source: bool,
) -> PlanReport:
    config, source = conversion.config, conversion.source
    workers, speeds = default_workers(config, workers), measure(conversion)
    todo = [shard for shard in conversion.shards if shard.file not in finished]
    seconds, arithmetic = estimate(
        read_bytes=sum(conversion.source_bytes(shard) for shard in todo),
        expert_bytes=sum(conversion.expert_source_bytes(shard.experts) for shard in todo),
        output_bytes=sum(shard.size for shard in todo),
        workers=workers,
        speeds=speeds,
    )
    kept = _kept(conversion.shards)
    return PlanReport(
        source=source.name,
        destination=str(dst),
        method=effective_method(conversion, method),
        moe_layers=len(config.moe_layers),
        experts_per_layer=config.n_routed_experts,
        source_bytes=sum(facts.size for facts in source.facts.values()),
        source_experts_bytes=conversion.expert_source_bytes(conversion.inventory.experts),
        output_bytes=conversion.output_bytes,
        experts_bytes=config.experts_bytes,
        backbone_bytes=sum(kept.values()),
        shards=len(conversion.shards),
        shards_finished=len(finished),
        kept_bf16=kept,
        left_out=left_out(conversion),
        needed_bytes=disk_peak(conversion, dst, finished, open_shards(workers), delete_source=delete_source),
        free_bytes=free_bytes(dst),
        workers=workers,
        speeds=speeds,
        seconds=seconds,
        arithmetic=arithmetic,
    )


def _kept(shards: Sequence[Shard]) -> dict[str, int]:
    kept: dict[str, int] = {}
    for tensor in (tensor for shard in shards for tensor in shard.backbone_tensors()):
        part = next(part for part, mark in _BACKBONE_PARTS if mark in tensor.name)
        kept[part] = kept.get(part, 0) + tensor.nbytes
    return kept


def estimate(
    *, read_bytes: int, expert_bytes: int, output_bytes: int, workers: int, speeds: Speeds
) -> tuple[float, list[str]]:
    """Seconds of a conversion, and their arithmetic as text: the larger of

        processor: (expert_bytes / kernel_gbps + output_bytes / sha256_gbps) / workers
        disk:      (read_bytes + output_bytes) / read_gbps

    The estimate assumes that source and destination share a disk, which writes as fast as it reads.
    """
    cpu_s = (expert_bytes / speeds.kernel_gbps + output_bytes / speeds.sha256_gbps) / workers / GIGA
    lines = [
        f"processor: ({format_bytes(expert_bytes)} of experts / {speeds.kernel_gbps:.2f} GB/s a thread + "
        f"{format_bytes(output_bytes)} / {speeds.sha256_gbps:.2f} GB/s of SHA-256) / {workers} threads "
        f"= {format_seconds(cpu_s)}"
    ]
    if speeds.read_gbps is None:
        lines.append("network: not measured; the source comes from the hub")
        return cpu_s, lines
    disk_s = (read_bytes + output_bytes) / speeds.read_gbps / GIGA
    lines.append(
        f"disk: ({format_bytes(read_bytes)} read + {format_bytes(output_bytes)} written) / "
        f"{speeds.read_gbps:.2f} GB/s = {format_seconds(disk_s)}"
    )
    return max(cpu_s, disk_s), lines


def render_plan(report: PlanReport, console: Console) -> None:
    """Print `report` on `console`."""
    print_rows(_rows(report), console)


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
