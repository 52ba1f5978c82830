"""`moebox inspect`: what a checkpoint folder holds, its experts' errors, whether it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moebox.config import CONFIG_FILE, ModelConfig, read_json
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import (
    EXPERT_TENSORS,
    MANIFEST_FILE,
    ExpertExtent,
    ExpertLayout,
    Manifest,
    check_extents,
    load_manifest,
)
from moebox.offload.checkpoint.safetensors import Checkpoint, TensorInfo
from moebox.quantize.check.verify import verify_shards
from moebox.quantize.output.journal import WORK_FOLDER, Journal
from moebox.quantize.output.shards import plan_shards
from moebox.quantize.output.small_files import bare_config, save_manifest
from moebox.quantize.progress import ProgressCallback
from moebox.quantize.source.formats import check_source
from moebox.quantize.source.inventory import SourceTensor, take_inventory
from moebox.quantize.text import format_bytes, print_rows
from moebox.units import PAGE_BYTES

WORST_EXPERTS = 10


@dataclass(frozen=True)
class LayerError:
    """Errors of one layer's experts.

    The mean and the largest relative RMS, the expert that has the largest, and the largest absolute error.
    """

    layer: int
    mean_rel_rms: float
    max_rel_rms: float
    worst_expert: int
    max_abs: float


@dataclass(frozen=True)
class ExpertError:
    """One expert's error: relative RMS, and the largest absolute error of a weight."""

    layer: int
    expert: int
    rel_rms: float
    max_abs: float


@dataclass(frozen=True)
class InspectReport:
    """What `inspect` found. Sizes in bytes."""

    folder: str
    state: str
    """"moebox" (written by `quantize`), "int4" (INT4 experts, another layout) or "unquantized"."""
    architecture: str
    shapes: dict[str, int]
    expert_encoding: str
    """"int4", "fp8" or "plain"."""
    total_bytes: int
    experts_bytes: int
    backbone_bytes: int
    left_out_bytes: int
    expert_bytes: int
    """Mean bytes of one expert as stored."""
    dtypes: dict[str, int]
    files: dict[str, int]
    method: str | None
    source: str | None
    left_out: list[str]
    experts_contiguous: int
    experts_aligned: int
    experts: int
    layers: list[LayerError]
    worst: list[ExpertError]
    verified: bool
    """Whether every shard was hashed and matched its SHA-256, and every expert its checksum."""
    quantized_bytes: int | None
    """Bytes of what `quantize` would make of the checkpoint; None for one that it has written."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def inspect(
    folder: Path | str,
    verify: bool = False,
    progress: ProgressCallback | None = None,
    worst: int = WORST_EXPERTS,
    *,
    add_checksums: bool = False,
    stores: Sequence[Path] = (),
) -> InspectReport:
    """Report on a checkpoint folder, quantized or not; without hashing only headers are read.

    Args:
        folder: holds `config.json` and safetensors shards.
        verify: hash every copy of every shard and every expert, and compare with `moebox.json`.
        progress: called while hashing.
        worst: how many of the worst experts to list.
        add_checksums: verify, and write the checksums of experts to a `moebox.json` that has none.
        stores: more folders with copies of shards, or with shards that `folder` lacks.

    Raises:
        ConfigError: no usable `config.json`.
        CheckpointError: no checkpoint, an unfinished one, a damaged one, or a hash that differs.
    """
    folder = Path(folder)
    refuse_unfinished(folder)
    checkpoint = Checkpoint.open(folder, stores)
    manifest = load_manifest(folder)
    if manifest is not None:
        check_extents(folder, checkpoint.config, manifest, checkpoint.shards)
    if verify or add_checksums:
        manifest = whole = verify_shards(checkpoint, manifest, progress)
        if add_checksums:
            save_manifest(folder, whole)
    return _report(checkpoint, manifest, worst, verified=verify or add_checksums)


def refuse_unfinished(folder: Path) -> None:
    """Raise `CheckpointError` where there is no folder, or a conversion into it was not finished."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / WORK_FOLDER).exists() and not (folder / MANIFEST_FILE).exists():
        journal = Journal(folder)
        journal.load()
        raise CheckpointError(
            f"{folder}: an unfinished conversion, {len(journal.shards)} shards so far",
            "Run the same `moebox quantize` command again; it continues.",
        )


def _report(
    checkpoint: Checkpoint, manifest: Manifest | None, worst: int, *, verified: bool
) -> InspectReport:
    config, tensors = checkpoint.config, checkpoint.tensors
    inventory = take_inventory(tensors, config)
    experts = [source for sources in inventory.experts.values() for source in sources]
    encodings = {check_source(source, tensors) for source in experts}
    for source in inventory.backbone.values():
        check_source(source, tensors)
    experts_bytes = _stored_bytes(experts, tensors)
    backbone_bytes = _stored_bytes(inventory.backbone.values(), tensors)
    total = sum(info.nbytes for info in tensors.values())
    errors = _expert_errors(manifest)
    contiguous, aligned = _placement(checkpoint) if encodings == {"int4"} else (0, 0)
    return InspectReport(
        folder=str(checkpoint.folder),
        state="moebox" if manifest else "int4" if encodings == {"int4"} else "unquantized",
        architecture=architecture(config),
        shapes=_shapes(config),
        expert_encoding=", ".join(sorted(encodings)),
        total_bytes=total,
        experts_bytes=experts_bytes,
        backbone_bytes=backbone_bytes,
        left_out_bytes=total - experts_bytes - backbone_bytes,
        expert_bytes=experts_bytes // len(inventory.experts),
        dtypes=_bytes_by_dtype(tensors.values()),
        files=_files(checkpoint),
        method=manifest.method if manifest else None,
        source=manifest.source.get("name") if manifest else None,
        left_out=manifest.left_out if manifest else sorted(inventory.left_out),
        experts_contiguous=contiguous,
        experts_aligned=aligned,
        experts=len(inventory.experts),
        layers=_layer_errors(errors),
        worst=sorted(errors, key=lambda error: (-error.rel_rms, error.layer, error.expert))[:worst],
        verified=verified,
        quantized_bytes=None if manifest else _quantized_bytes(checkpoint),
    )


def _stored_bytes(sources: Iterable[SourceTensor], tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensors[name].nbytes for source in sources for name in source.parts.values())


def _bytes_by_dtype(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    dtypes: dict[str, int] = {}
    for info in tensors:
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + info.nbytes
    return dtypes


def _quantized_bytes(checkpoint: Checkpoint) -> int:
    config = bare_config(checkpoint.config, read_json(checkpoint.folder / CONFIG_FILE))
    return sum(shard.size for shard in plan_shards(config))


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    files = sorted({info.file for info in checkpoint.tensors.values()})
    return {file.name: file.stat().st_size for file in files}


def architecture(config: ModelConfig) -> str:
    """One line: layers, experts, attention, context."""
    dense = config.first_k_dense_replace
    yarn = f", YaRN x{config.yarn.factor:g}" if config.yarn else ""
    return (
        f"{config.model_type}: {config.num_hidden_layers} layers "
        f"({dense} dense, {len(config.moe_layers)} MoE), "
        f"{config.n_routed_experts} experts + {config.n_shared_experts} shared, "
        f"top {config.num_experts_per_tok}, context {config.max_position_embeddings}{yarn}"
    )


def _shapes(config: ModelConfig) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank or 0,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "vocab_size": config.vocab_size,
    }


def _expert_errors(manifest: Manifest | None) -> list[ExpertError]:
    layers: dict[int, list[ExpertExtent]] = manifest.experts if manifest else {}
    return [
        ExpertError(layer, expert, extent.rel_rms, extent.max_abs)
        for layer, extents in layers.items()
        for expert, extent in enumerate(extents)
    ]


def _layer_errors(errors: list[ExpertError]) -> list[LayerError]:
    layers: dict[int, list[ExpertError]] = {}
    for error in errors:
        layers.setdefault(error.layer, []).append(error)
    rows = []
    for layer, members in sorted(layers.items()):
        worst = max(members, key=lambda error: error.rel_rms)
        mean = math.fsum(error.rel_rms for error in members) / len(members)
        largest = max(error.max_abs for error in members)
        rows.append(LayerError(layer, mean, worst.rel_rms, worst.expert, largest))
    return rows


def _placement(checkpoint: Checkpoint) -> tuple[int, int]:
    """How many experts are one run of bytes, and how many of these start on a page."""
    config, layout = checkpoint.config, ExpertLayout(checkpoint.config)
    contiguous = aligned = 0
    for layer in config.moe_layers:
        for expert in range(config.n_routed_experts):
            name = config.expert_name(layer, expert)
            infos = [checkpoint.info(f"{name}.{suffix}") for suffix in EXPERT_TENSORS]
            start = infos[0].offset
            if all(
                (info.file, info.offset) == (infos[0].file, start + offset)
                for info, offset in zip(infos, layout.offsets, strict=True)
            ):
                contiguous += 1
                aligned += start % PAGE_BYTES == 0
    return contiguous, aligned


def render_inspect(report: InspectReport, console: Console) -> None:
    """Print `report` on `console`."""
    print_rows(_summary(report), console)
    if report.method == "rtn":
        console.print(_layer_table(report))
        console.print(_worst_table(report))


def _summary(report: InspectReport) -> list[tuple[str, str]]:
    shapes = ", ".join(f"{name} {value}" for name, value in report.shapes.items())
    dtypes = ", ".join(f"{dtype} {format_bytes(nbytes)}" for dtype, nbytes in sorted(report.dtypes.items()))
    rows = [
        ("model", report.architecture),
        ("shapes", shapes),
        (
            "size",
            f"{format_bytes(report.total_bytes)} in {len(report.files)} shard(s): "
            f"experts {format_bytes(report.experts_bytes)} ({report.experts} of "
            f"{format_bytes(report.expert_bytes)}, {report.expert_encoding}), "
            f"backbone {format_bytes(report.backbone_bytes)}",
        ),
        ("dtypes", dtypes),
    ]
    if report.state == "moebox":
        rows.append(("made from", f"{report.source}, {report.method}"))
    if report.expert_encoding == "int4":
        placed = f"{report.experts_contiguous} of {report.experts} contiguous"
        rows.append(("experts", f"{placed}, {report.experts_aligned} of these start on a page"))
    if report.left_out:
        rows.append(("left out", ", ".join(report.left_out)))
    if report.quantized_bytes is not None:
        rows.append(
            (
                "quantize",
                f"would make {format_bytes(report.quantized_bytes)} of it: `moebox quantize SRC DST`",
            )
        )
    if report.verified:
        rows.append(("verified", f"SHA-256 of all {len(report.files)} shards match"))
    return rows


def _layer_table(report: InspectReport) -> Table:
    table = Table("layer", "mean rel. RMS", "worst", "expert", "max |error|", title="error per layer")
    for row in report.layers:
        table.add_row(
            str(row.layer),
            f"{row.mean_rel_rms:.4f}",
            f"{row.max_rel_rms:.4f}",
            str(row.worst_expert),
            f"{row.max_abs:.3g}",
        )
    return table


def _worst_table(report: InspectReport) -> Table:
    table = Table("layer", "expert", "rel. RMS", "max |error|", title="worst experts")
    for row in report.worst:
        table.add_row(str(row.layer), str(row.expert), f"{row.rel_rms:.4f}", f"{row.max_abs:.3g}")
    return table
