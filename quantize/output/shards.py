"""Where each tensor stands in the output, which follows from the config alone.

Neither the source's encoding nor the number of workers nor earlier runs change the layout, and so they do
not change the output's bytes. Shards are filled with blocks in the order of the model: the embedding, each
layer, the head. A layer that is larger than a shard is cut into equal runs of experts; its backbone goes
with the last one. Within a shard the order is experts, `weight_shape`, F32, BF16, so that every tensor is
aligned to its elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from moebox.config import EXPERT_PROJECTIONS, ModelConfig
from moebox.offload.checkpoint.layout import EXPERT_TENSORS, ExpertLayout
from moebox.offload.checkpoint.safetensors import TensorSpec, encode_header
from moebox.quantize.encodings import BIAS_SUFFIX
from moebox.units import PAGE_BYTES

SHARD_BYTES = 4_000_000_000
"""Default limit of a shard's data."""


@dataclass(frozen=True)
class Shard:
    """One output file: which experts (layer, expert) and which backbone tensors it holds."""

    file: str
    config: ModelConfig
    experts: tuple[tuple[int, int], ...]
    backbone: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every tensor, in file order."""
        return (*self._expert_tensors(), *self._weight_shapes(), *self.backbone_tensors())

    @cached_property
    def header(self) -> bytes:
        """Length prefix and JSON, padded so that the data, and with it the first expert, starts on a page."""
        return encode_header(self.tensors, PAGE_BYTES)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes behind the header."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.data_bytes

    @property
    def offsets(self) -> dict[str, int]:
        """Tensor name -> where its data starts in the file, in bytes."""
        starts = accumulate((tensor.nbytes for tensor in self.tensors), initial=len(self.header))
        return {tensor.name: start for tensor, start in zip(self.tensors, starts, strict=False)}

    def expert_offset(self, position: int) -> int:
        """Byte of the file at which expert number `position` of this shard starts."""
        return len(self.header) + position * self.config.expert_bytes

    @property
    def experts_end(self) -> int:
        """Byte of the file at which the experts end and their `weight_shape` tensors start."""
        return self.expert_offset(len(self.experts))

    def _expert_tensors(self) -> Iterator[TensorSpec]:
        layout = ExpertLayout(self.config)
        kinds = list(zip(EXPERT_TENSORS, layout.dtypes, layout.shapes, strict=True))
        for layer, expert in self.experts:
            name = self.config.expert_name(layer, expert)
            yield from (TensorSpec(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in kinds)

    def _weight_shapes(self) -> Iterator[TensorSpec]:
        for layer, expert in self.experts:
            name = self.config.expert_name(layer, expert)
            for projection in EXPERT_PROJECTIONS:
                yield TensorSpec(f"{name}.{projection}.weight_shape", "I32", (2,))

    def backbone_tensors(self) -> list[TensorSpec]:
        """The tensors outside the routed experts, in file order: F32 before BF16, so that all are aligned."""
        tensors = [
            TensorSpec(name, "F32" if name.endswith(BIAS_SUFFIX) else "BF16", shape)
            for name, shape in self.backbone
        ]
        return sorted(tensors, key=lambda tensor: (tensor.dtype != "F32", tensor.name))


@dataclass(frozen=True)
class _Block:
    experts: tuple[tuple[int, int], ...]
    backbone: tuple[tuple[str, tuple[int, ...]], ...]

    def data_bytes(self, config: ModelConfig) -> int:
        return len(self.experts) * config.expert_bytes + 2 * sum(
            math.prod(shape) for _, shape in self.backbone
        )


def plan_shards(config: ModelConfig, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """The output's shards.

    Args:
        config: the output's model: `prefix` is empty.
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
