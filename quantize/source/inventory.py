"""What each tensor of a source checkpoint is for, decided from names alone: `take_inventory`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from moebox.config import EXPERT_PROJECTIONS, ModelConfig
from moebox.errors import CheckpointError
from moebox.quantize.encodings import PARTS, Encoding

READABLE = "moebox reads FP8 with 128x128 blocks, BF16, F16, F32 and symmetric INT4 with groups of 32."

_EXPERT = re.compile(rf"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.({'|'.join(EXPERT_PROJECTIONS)})\.(\w+)")
_ALL_PARTS = {part for parts in PARTS.values() for part in parts}
_NEXT_TOKEN_MARK = ".eh_proj."
_REFUSED_PARTS = {
    "weight_zero_point": "asymmetric INT4 (a zero point)",
    "weight_g_idx": "INT4 with activation ordering (g_idx)",
    "qweight": "the GPTQ layout",
    "qzeros": "the GPTQ layout",
    "scales": "the GPTQ layout",
    "g_idx": "the GPTQ layout",
    "input_scale": "static activation scales",
    "weight_global_scale": "the NVFP4 layout",
}


class TensorRole(NamedTuple):
    """What a checkpoint's tensor is for.

    `name` is the output's tensor that it belongs to, without the `language_model.` prefix and ending in
    `.weight` or `.e_score_correction_bias`; `part` is a name of `encodings.PARTS`. For tensors that are left
    out of the output, `name` is a pattern such as `vision_tower.*`.
    """

    kind: Literal["expert", "backbone", "left_out"]
    name: str
    part: str = "weight"
    layer: int = -1
    expert: int = -1
    projection: str = ""


def classify(name: str, config: ModelConfig) -> TensorRole:
    """What the tensor `name` of a checkpoint with `config` is for.

    Raises:
        CheckpointError: the family has no such tensor, or it belongs to an encoding moebox does not read.
    """
    if config.prefix:
        for vision in ("vision_tower.", "mm_projector."):
            if name.startswith(vision):
                return TensorRole("left_out", f"{vision}*")
        if not name.startswith(config.prefix):
            raise _unknown(name)
    bare = name.removeprefix(config.prefix)
    expert = _EXPERT.fullmatch(bare)
    if bare.startswith(f"model.layers.{config.num_hidden_layers}."):
        return TensorRole("left_out", f"model.layers.{config.num_hidden_layers}.*")
    if expert is not None:
        return _classify_expert(name, expert, config)
    if bare.endswith(".rotary_emb.inv_freq"):
        return TensorRole("left_out", "*.rotary_emb.inv_freq")
    return _classify_backbone(name, bare, config)


def _classify_expert(name: str, match: re.Match[str], config: ModelConfig) -> TensorRole:
    layer, expert, projection, part = int(match[1]), int(match[2]), match[3], match[4]
    _refuse_part(name, part)
    if layer not in config.moe_layers or expert >= config.n_routed_experts or part not in _ALL_PARTS:
        raise _unknown(name)
    module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
    return TensorRole("expert", f"{module}.weight", part, layer, expert, projection)


def _classify_backbone(name: str, bare: str, config: ModelConfig) -> TensorRole:
    shapes = _backbone_shapes(config)
    if bare in shapes:
        return TensorRole("backbone", bare)
    module, _, part = bare.rpartition(".")
    _refuse_part(name, part)
    if part in _ALL_PARTS and len(shapes.get(f"{module}.weight", ())) == 2:
        return TensorRole("backbone", f"{module}.weight", part)
    raise _unknown(name)


@lru_cache(maxsize=4)
def _backbone_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(config.prefix): shape for name, shape in config.backbone_shapes().items()}


def _refuse_part(name: str, part: str) -> None:
    if part in _REFUSED_PARTS:
        raise CheckpointError(f"{name}: the checkpoint uses {_REFUSED_PARTS[part]}", READABLE)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: no tensor of the model that config.json describes",
        "Check that config.json belongs to these files.",
    )


@dataclass(frozen=True)
class SourceTensor:
    """The source tensors that one matrix or vector of the output is made from.

    `parts` maps a name of `encodings.PARTS` to the source's full tensor name; `shape` is what the config
    implies.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]

    @property
    def encoding(self) -> Encoding:
        """The encoding that has these parts."""
        return _encoding_of(self.parts)


@dataclass(frozen=True)
class Inventory:
    """A checkpoint's tensors by use.

    Attributes:
        experts: (layer, expert) -> gate, up and down, in that order.
        backbone: output name -> source, in the order of `ModelConfig.backbone_shapes`.
        left_out: pattern -> how many of the source's tensors it covers.
    """

    experts: dict[tuple[int, int], tuple[SourceTensor, ...]]
    backbone: dict[str, SourceTensor]
    left_out: dict[str, int] = field(default_factory=dict)


def take_inventory(names: Iterable[str], config: ModelConfig) -> Inventory:
    """Sort all tensor names of a checkpoint by use.

    Raises:
        CheckpointError: a tensor is unknown, missing or of an encoding that moebox does not read, or the
            checkpoint has one decoder layer more than its config says.
    """
    parts: dict[str, dict[str, str]] = {}
    left_out: Counter[str] = Counter()
    next_token = f"{config.layer_name(config.num_hidden_layers)}."
    next_token_marked = next_token_seen = False
    for name in names:
        role = classify(name, config)
        if role.kind == "left_out":
            left_out[role.name] += 1
            if name.startswith(next_token):
                next_token_seen = True
                next_token_marked |= _NEXT_TOKEN_MARK in name
        else:
            parts.setdefault(role.name, {})[role.part] = name
    if next_token_seen and not next_token_marked:
        raise CheckpointError(
            f"{next_token}*: config.json has num_hidden_layers = {config.num_hidden_layers}, "
            "the checkpoint one layer more, which is no next-token prediction layer",
            "Check that config.json belongs to these files.",
        )
    experts = {
        (layer, expert): tuple(
            _source(f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight", shape, parts)
            for projection, shape in config.expert_shapes().items()
        )
        for layer in config.moe_layers
        for expert in range(config.n_routed_experts)
    }
    backbone = {name: _source(name, shape, parts) for name, shape in _backbone_shapes(config).items()}
    return Inventory(experts, backbone, dict(left_out))


def _source(name: str, shape: tuple[int, ...], parts: Mapping[str, Mapping[str, str]]) -> SourceTensor:
    found = parts.get(name, {})
    wanted = PARTS[_encoding_of(found)]
    for part in wanted:
        if part not in found:
            raise CheckpointError(
                f"{_part_name(name, part)}: missing from the checkpoint", "Fetch the whole checkpoint."
            )
    for part in found:
        if part not in wanted:
            raise CheckpointError(f"{found[part]}: stands beside {found[wanted[0]]}, which it does not fit")
    return SourceTensor(name, shape, found)


def _encoding_of(parts: Mapping[str, str]) -> Encoding:
    if "weight_packed" in parts:
        return "int4"
    return "fp8" if "weight_scale_inv" in parts else "plain"


def _part_name(name: str, part: str) -> str:
    return name if part == "weight" else name.removesuffix("weight") + part
