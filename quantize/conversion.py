"""What is converted into what: a checked source, and the shards that it becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moebox.config import ModelConfig
from moebox.offload.checkpoint.safetensors import TensorInfo
from moebox.quantize.output.shards import Shard
from moebox.quantize.source.base import Source
from moebox.quantize.source.inventory import Inventory, SourceTensor

Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Conversion:
    """A source checkpoint, its tensors sorted and checked, and the shards that it becomes.

    Attributes:
        source: where the source's shards come from.
        config: the source's model, with the prefix of its tensor names.
        inventory: the source's tensors by use.
        infos: source tensor name -> where it lies.
        shards: the output's shards, in order.
    """

    source: Source
    config: ModelConfig
    inventory: Inventory
    infos: Infos
    shards: tuple[Shard, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output shards."""
        return sum(shard.size for shard in self.shards)

    def source_tensors(self, shard: Shard) -> list[SourceTensor]:
        """What `shard` is made from."""
        experts = [tensor for key in shard.experts for tensor in self.inventory.experts[key]]
        return experts + [self.inventory.backbone[name] for name, _ in shard.backbone]

    def files(self, shard: Shard) -> list[str]:
        """The source shards that `shard` needs, in the order in which it needs them."""
        names = (part for tensor in self.source_tensors(shard) for part in tensor.parts.values())
        return list(dict.fromkeys(self.source.weight_map[name] for name in names))

    def parts(self, tensors: Iterable[SourceTensor]) -> list[TensorInfo]:
        """Where all parts of `tensors` lie."""
        return [self.infos[name] for tensor in tensors for name in tensor.parts.values()]

    def source_bytes(self, shard: Shard) -> int:
        """Bytes of the source tensors that `shard` is made from."""
        return sum(info.nbytes for info in self.parts(self.source_tensors(shard)))

    def expert_source_bytes(self, experts: Iterable[tuple[int, int]]) -> int:
        """Bytes of the source tensors of `experts`, given as (layer, expert)."""
        return sum(info.nbytes for key in experts for info in self.parts(self.inventory.experts[key]))
