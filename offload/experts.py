"""What the model asks for routed experts, and where a checkpoint has them.

The model knows layers, expert ids, weights and hidden states; where an expert lies is this package's
business: `cpu_experts.py` without a GPU, `tiers.py` with one.

Shapes: T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

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
from moebox.offload.traffic import Traffic

log = logging.getLogger("moebox")

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and what there is to do, in bytes."""
Int32s = npt.NDArray[np.int32]


class Experts(Protocol):
    """The routed experts of all layers, wherever they live."""

    nbytes: int

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            layer: index of an MoE layer.
            expert_ids: int64 [T, k], in any order.
            weights: fp32 [T, k].
            hidden: bf16 or fp32 [T, H].

        Returns:
            fp32 [T, H]: `sum_j weights[t, j] * expert[expert_ids[t, j]](hidden[t])`.
        """
        ...

    def traffic(self) -> Traffic:
        """Where experts were found and what moved since loading began; differences count."""
        ...


def group_by_expert(
    expert_ids: npt.NDArray[np.int64],
) -> tuple[list[int], Int32s, Int32s, npt.NDArray[np.intp]]:
    """Turn each token's experts into each expert's tokens.

    Args:
        expert_ids: [T, k].

    Returns:
        The n distinct experts, ascending; offsets int32 [n + 1] and tokens int32 [T * k], so that the
        i-th expert gets `tokens[offsets[i]:offsets[i + 1]]`; the permutation [T * k] that sorts the flat ids.
    """
    count, top_k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    if flat.size and int(flat.max()) < 1 << 15:
        flat = flat.astype(np.int16)  # numpy sorts 16-bit integers by radix: a tenth of the time
    order = np.argsort(flat, kind="stable")
    if count == 1:  # decoding: every expert has the one token
        return flat[order].tolist(), np.arange(top_k + 1, dtype=np.int32), np.zeros(top_k, np.int32), order
    in_order = flat[order]
    bounds = [0, *(np.flatnonzero(in_order[1:] != in_order[:-1]) + 1).tolist(), flat.size]
    tokens = (order // top_k).astype(np.int32)
    return in_order[bounds[:-1]].tolist(), np.array(bounds, np.int32), tokens, order


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
    """Compare the manifest's extents with the shards' headers."""
    for extent, infos in zip(manifest.experts[layer], experts, strict=True):
        for info, offset in zip(infos, layout.offsets, strict=True):
            if (info.file.name, info.offset) != (extent.file, extent.offset + offset):
                raise CheckpointError(
                    f"{info.file}: {info.name}: at byte {info.offset}; {MANIFEST_FILE} says {extent.file}, "
                    f"byte {extent.offset + offset}",
                    "The manifest belongs to other shards; quantize the source again.",
                )
