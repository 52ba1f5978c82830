"""The layout of an INT4 expert: the same bytes on disk, in RAM and on a GPU.

An expert is six tensors back to back (compressed-tensors `pack-quantized`, group 32, bf16 scales).
`moebox.json` says where each expert's bytes, its extent, start. A K2 expert has 24,772,608 bytes = 6,048
pages: in a shard whose data starts on a page, every expert starts on a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moebox import _kernels
from moebox.config import EXPERT_PROJECTIONS, GROUP_SIZE, ModelConfig, read_json
from moebox.errors import CheckpointError

MANIFEST_FILE = "moebox.json"
MANIFEST_FORMAT = 2
READABLE_FORMATS = (1, 2)
"""Format 1 had no checksums of experts."""

EXPERT_PARTS = ("weight_packed", "weight_scale")
"""What an INT4 matrix consists of: packed values int32 [out, in/8], then scales bf16 [out, in/32]."""
EXPERT_TENSORS = tuple(f"{projection}.{part}" for projection in EXPERT_PROJECTIONS for part in EXPERT_PARTS)
"""The six tensors of an expert in the order of its bytes: gate, up, down, each packed values then scales."""


class ExpertLayout:
    """Where an expert's six tensors lie within its extent; all lists are in the order of `EXPERT_TENSORS`.

    Attributes:
        shapes: [out, in/8] of packed values, [out, in/32] of scales.
        dtypes: safetensors names: I32 of packed values, BF16 of scales.
        sizes: bytes of each tensor.
        offsets: bytes from the extent's start.
        nbytes: bytes of the extent.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.dtypes: list[str] = []
        self.sizes: list[int] = []
        for rows, columns in config.expert_shapes().values():
            self.shapes += [(rows, columns // 8), (rows, columns // GROUP_SIZE)]
            self.dtypes += ["I32", "BF16"]
            self.sizes += [rows * columns // 2, rows * columns // GROUP_SIZE * 2]
        self.offsets = [sum(self.sizes[:position]) for position in range(len(self.sizes))]
        self.nbytes = sum(self.sizes)


@dataclass(frozen=True)
class ExpertExtent:
    """Where one expert's bytes lie, and their quantization error.

    `rel_rms` is the root mean square of the error divided by that of the source's weights; `max_abs` is the
    largest absolute error. Both are 0 where the source was INT4. `xxh3` is the XXH3-64 of the bytes, 16 hex
    digits; it is None where an older moebox wrote the manifest.
    """

    file: str
    offset: int
    nbytes: int
    rel_rms: float = 0.0
    max_abs: float = 0.0
    xxh3: str | None = None


def expert_checksum(data: npt.NDArray[np.uint8]) -> str:
    """`ExpertExtent.xxh3` of an expert's bytes, uint8 [nbytes]."""
    return f"{_kernels.xxh3_64(data):016x}"


@dataclass
class Manifest:
    """`moebox.json`. A conversion writes it last, so a folder that has it is complete."""

    moebox: str
    method: str
    source: dict[str, Any]
    shards: dict[str, dict[str, Any]]
    """file name -> {"size": bytes, "sha256": hex}"""
    experts: dict[int, list[ExpertExtent]]
    """layer -> extent of each expert"""
    left_out: list[str] = field(default_factory=list)
    format: int = MANIFEST_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `load_manifest` reads."""
        data = asdict(self)
        data["experts"] = {str(layer): extents for layer, extents in data["experts"].items()}
        return data


def load_manifest(folder: Path) -> Manifest | None:
    """Read `folder/moebox.json`; None where moebox did not write the checkpoint.

    Raises:
        CheckpointError: the manifest is malformed or of a newer format.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    data = read_json(path)
    if data.get("format") not in READABLE_FORMATS:
        raise CheckpointError(
            f"{path}: format {data.get('format')!r}, this moebox reads {READABLE_FORMATS}",
            "Update moebox, or quantize the source again.",
        )
    try:
        experts = {
            int(layer): [ExpertExtent(**extent) for extent in extents]
            for layer, extents in data["experts"].items()
        }
        return Manifest(**(data | {"experts": experts}))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: malformed: {error}", "Quantize the source again.") from None


def check_extents(
    folder: Path,
    config: ModelConfig,
    manifest: Manifest,
    shards: Mapping[str, Sequence[Path]] | None = None,
) -> None:
    """Compare the manifest with the config and the files' sizes.

    Args:
        shards: where the shards lie, as in `Checkpoint.shards`; by default all are in `folder`.

    Raises:
        CheckpointError: an expert is missing, of the wrong size, or beyond its file's end.
    """
    path = folder / MANIFEST_FILE
    expected = ExpertLayout(config).nbytes
    sizes: dict[str, int] = {}
    for layer in config.moe_layers:
        extents = manifest.experts.get(layer, [])
        if len(extents) != config.n_routed_experts:
            raise CheckpointError(
                f"{path}: layer {layer} has {len(extents)} experts, the config {config.n_routed_experts}"
            )
        for expert, extent in enumerate(extents):
            name = config.expert_name(layer, expert)
            shard = (shards or {}).get(extent.file, [folder / extent.file])[0]
            if extent.file not in sizes:
                sizes[extent.file] = _file_size(shard)
            if extent.nbytes != expected:
                raise CheckpointError(f"{path}: {name}: {extent.nbytes} bytes, the config implies {expected}")
            if extent.offset < 0 or extent.offset + extent.nbytes > sizes[extent.file]:
                raise CheckpointError(
                    f"{shard}: {name}: ends at byte {extent.offset + extent.nbytes}, "
                    f"the file has {sizes[extent.file]}",
                    "The file is truncated; quantize the source again.",
                )


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", "Restore the shard, or quantize again.") from None
