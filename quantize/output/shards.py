"""Which tensor stands where in the output: decided from the config alone, before the first byte.

Nothing here depends on the source's format, on the number of workers or on earlier runs, so neither do
the output's bytes. Blocks (embedding, each layer, head) are packed into shards in the order in which
sources store them; a layer larger than a shard is cut into equal runs of experts, its backbone last.
Within a shard: experts, then `weight_shape`, then F32, then BF16 tensors, so that all stay aligned.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from moebox.config import ModelConfig
from moebox.offload.checkpoint.layout import ALIGNMENT, EXPERT_PROJECTIONS, EXPERT_TENSORS, ExpertLayout
from moebox.offload.checkpoint.safetensors import TORCH_DTYPES

SHARD_BYTES = 4_000_000_000
"""Default limit of a shard's data; one tensor or one expert may still be larger."""

F32_SUFFIX = ".e_score_correction_bias"
"""The one tensor of the backbone that stays float32: it decides ties between experts."""


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of an output shard; `offset` counts from the start of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file: which experts (layer, expert) and which backbone tensors it holds."""

    file: str
    config: ModelConfig
    experts: tuple[tuple[int, int], ...]
    backbone: tuple[tuple[str, tuple[int, ...]], ...]

    @cached_property
    def header(self) -> bytes:
        """Length prefix and JSON, padded with spaces so that the data starts on a page."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, dtype, shape, begin, nbytes in self._relative():
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + nbytes]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text = text.ljust(_round_up(8 + len(text)) - 8)
        return struct.pack("<Q", len(text)) + text

    @cached_property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @cached_property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return sum(nbytes for *_, nbytes in self._relative())

    def tensors(self) -> list[OutputTensor]:
        """Every tensor in file order."""
        start = len(self.header)
        return [
            OutputTensor(name, dtype, shape, start + begin, n)
            for name, dtype, shape, begin, n in self._relative()
        ]

    def expert_offset(self, position: int) -> int:
        """Where the shard's `position`-th expert starts in the file."""
        return len(self.header) + position * self.config.expert_bytes

    def _relative(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        members = [*self._expert_tensors(), *self._weight_shapes(), *self._backbone_tensors()]
        position, placed = 0, []
        for name, dtype, shape in members:
            nbytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
            placed.append((name, dtype, shape, position, nbytes))
            position += nbytes
        return placed

    def _expert_tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        layout = ExpertLayout(self.config)
        kinds = list(zip(EXPERT_TENSORS, layout.dtypes, layout.shapes, strict=True))
        return [
            (f"{self.config.expert_name(layer, expert)}.{suffix}", dtype, shape)
            for layer, expert in self.experts
            for suffix, dtype, shape in kinds
        ]

    def _weight_shapes(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [
            (f"{self.config.expert_name(layer, expert)}.{projection}.weight_shape", "I32", (2,))
            for layer, expert in self.experts
            for projection in EXPERT_PROJECTIONS
        ]

    def _backbone_tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        members = [
            (name, "F32" if name.endswith(F32_SUFFIX) else "BF16", shape) for name, shape in self.backbone
        ]
        return sorted(members, key=lambda member: (member[1] != "F32", member[0]))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Block:
    experts: tuple[tuple[int, int], ...]
    backbone: tuple[tuple[str, tuple[int, ...]], ...]

    def data_bytes(self, config: ModelConfig) -> int:
        return len(self.experts) * config.expert_bytes + 2 * sum(
            math.prod(shape) for _, shape in self.backbone
        )


def plan_shards(config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """The output's shards. `config` is the output's: without the `language_model.` prefix.

    Args:
        config: the model, `prefix` empty.
        shard_bytes: limit of a shard's data; a single expert or backbone block may exceed it.
    """
    groups: list[list[_Block]] = []
    open_group: list[_Block] = []
    for block in _blocks(config):
        for part in _cut(block, config, shard_bytes):
            filled = sum(member.data_bytes(config) for member in [*open_group, part])
            if open_group and filled > shard_bytes:
                groups.append(open_group)
                open_group = []
            open_group.append(part)
    groups.append(open_group)
    return [
        Shard(
            f"model-{number:05}-of-{len(groups):05}.safetensors",
            config,
            tuple(expert for block in group for expert in block.experts),
            tuple(tensor for block in group for tensor in block.backbone),
        )
        for number, group in enumerate(groups, start=1)
    ]


def _blocks(config: ModelConfig) -> list[_Block]:
    shapes = config.backbone_shapes()
    by_layer: dict[int, list[tuple[str, tuple[int, ...]]]] = {
        layer: [] for layer in range(config.num_hidden_layers)
    }
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            by_layer[int(name.split(".")[2])].append((name, shape))
    embedding = "model.embed_tokens.weight"
    head = [(name, shapes[name]) for name in ("model.norm.weight", "lm_head.weight")]
    layers = [
        _Block(
            tuple((layer, expert) for expert in range(config.n_routed_experts))
            if layer in config.moe_layers
            else (),
            tuple(members),
        )
        for layer, members in by_layer.items()
    ]
    return [_Block((), ((embedding, shapes[embedding]),)), *layers, _Block((), tuple(head))]


def _cut(block: _Block, config: ModelConfig, shard_bytes: int) -> list[_Block]:
    parts = min(math.ceil(block.data_bytes(config) / shard_bytes), len(block.experts))
    if parts <= 1:
        return [block]
    bounds = [len(block.experts) * part // parts for part in range(parts + 1)]
    return [
        _Block(block.experts[begin:end], block.backbone if end == bounds[-1] else ())
        for begin, end in pairwise(bounds)
    ]
