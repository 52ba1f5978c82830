"""Where the routed experts lie in a checkpoint's shards, checked against its config and its manifest."""

from __future__ import annotations

import logging

from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import (
    EXPERT_TENSORS,
    MANIFEST_FILE,
    ExpertLayout,
    Manifest,
    check_extents,
    load_manifest,
)
from moebox.offload.checkpoint.safetensors import Checkpoint, TensorInfo

log = logging.getLogger("moebox")


def find_experts(checkpoint: Checkpoint) -> dict[int, list[list[TensorInfo]]]:
    """Where the six tensors of each expert lie: MoE layer -> experts -> tensors, as `EXPERT_TENSORS`.

    Raises:
        CheckpointError: a tensor is missing, of a wrong shape or type, or not where `moebox.json` says.
    """
    config, layout = checkpoint.config, ExpertLayout(checkpoint.config)
    manifest = load_manifest(checkpoint.folder)
    if manifest is None:
        log.warning(
            "%s was not written by moebox: its experts take six reads each instead of one; "
            "`moebox quantize` copies it to the layout that takes one",
            checkpoint.folder,
        )
    else:
        check_extents(checkpoint.folder, config, manifest, checkpoint.shards)
    layers = {}
    for layer in config.moe_layers:
        layers[layer] = [
            expert_tensors(checkpoint, layout, layer, expert) for expert in range(config.n_routed_experts)
        ]
        if manifest is not None:
            _check_places(manifest, layout, layer, layers[layer])
    return layers


def expert_tensors(checkpoint: Checkpoint, layout: ExpertLayout, layer: int, expert: int) -> list[TensorInfo]:
    """Where an expert's six tensors lie, in the order of `EXPERT_TENSORS`, types and shapes checked."""
    infos = []
    name = checkpoint.config.expert_name(layer, expert)
    for suffix, dtype, shape in zip(EXPERT_TENSORS, layout.dtypes, layout.shapes, strict=True):
        info = checkpoint.info(f"{name}.{suffix}")
        if (info.dtype, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{info.file}: {info.name}: {info.dtype} {list(info.shape)}, "
                f"the config implies {dtype} {list(shape)}",
                "moebox runs INT4 experts with one bf16 scale per 32 inputs; quantize the original weights.",
            )
        infos.append(info)
    return infos


def _check_places(
    manifest: Manifest, layout: ExpertLayout, layer: int, experts: list[list[TensorInfo]]
) -> None:
    """Raise `CheckpointError` where the manifest's extents are not where the shards' headers say."""
    for extent, infos in zip(manifest.experts[layer], experts, strict=True):
        for info, offset in zip(infos, layout.offsets, strict=True):
            if (info.file.name, info.offset) != (extent.file, extent.offset + offset):
                raise CheckpointError(
                    f"{info.file}: {info.name}: at byte {info.offset}; {MANIFEST_FILE} says {extent.file}, "
                    f"byte {extent.offset + offset}",
                    "The manifest belongs to other shards; quantize the source again.",
                )
