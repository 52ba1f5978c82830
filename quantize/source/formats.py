"""Reading checkpoints of the family: FP8 in 128 x 128 blocks, BF16/F16/F32, native INT4 in groups of 32.

`take_inventory` sorts tensor names into experts, backbone and what is left out, before any data is at
hand; `check_source` looks at headers; `read_expert` and `read_backbone` look at data. Which of the three
encodings a tensor has is decided per tensor, by the parts that are there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any, Literal, NamedTuple

import torch

from moebox.config import GROUP_SIZE, ModelConfig
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import TensorInfo, open_tensor
from moebox.quantize.int4 import (
    FP8_BLOCK,
    Int4Matrix,
    NonFiniteError,
    QuantError,
    check_finite,
    dequantize,
    quantize_int4,
    to_bfloat16,
)

Encoding = Literal["fp8", "plain", "int4"]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PARTS = ("weight", "weight_scale_inv", "weight_packed", "weight_scale", "weight_shape")

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(\w+)")
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
_READABLE = "moebox reads FP8 with 128x128 blocks, BF16, F16, F32 and symmetric INT4 with groups of 32."


class TensorRole(NamedTuple):
    """What a checkpoint's tensor is for.

    `name` is what it belongs to in the output, without the `language_model.` prefix and ending in
    `.weight` (or `.e_score_correction_bias`); `part` says which of `PARTS` it is. For `left_out`
    tensors, `name` is a pattern such as `vision_tower.*`.
    """

    kind: Literal["expert", "backbone", "left_out"]
    name: str
    part: str = "weight"
    layer: int = -1
    expert: int = -1
    projection: str = ""


def classify(name: str, config: ModelConfig) -> TensorRole:
    """Say what tensor `name` of a checkpoint with `config` is for.

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
    if layer not in config.moe_layers or expert >= config.n_routed_experts or part not in PARTS:
        raise _unknown(name)
    module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
    return TensorRole("expert", f"{module}.weight", part, layer, expert, projection)


def _classify_backbone(name: str, bare: str, config: ModelConfig) -> TensorRole:
    shapes = _backbone_shapes(config)
    if bare in shapes:
        return TensorRole("backbone", bare)
    module, _, part = bare.rpartition(".")
    _refuse_part(name, part)
    if part in PARTS and len(shapes.get(f"{module}.weight", ())) == 2:
        return TensorRole("backbone", f"{module}.weight", part)
    raise _unknown(name)


@lru_cache(maxsize=4)
def _backbone_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(config.prefix): shape for name, shape in config.backbone_shapes().items()}


def _refuse_part(name: str, part: str) -> None:
    if part in _REFUSED_PARTS:
        raise CheckpointError(f"{name}: the checkpoint uses {_REFUSED_PARTS[part]}", _READABLE)


def _unknown(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: no tensor of the model that config.json describes",
        "Check that config.json belongs to these files.",
    )


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the output and the source tensors that it is made from.

    `parts` maps a suffix of `PARTS` to the source's full tensor name; `shape` is what the config implies.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]


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
    """Sort every tensor name of a checkpoint; no data is needed.

    Raises:
        CheckpointError: a tensor is unknown, missing or of an encoding that moebox does not read, or the
            checkpoint has one layer more than its config says.
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
    if "weight_packed" in found:
        wanted: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    else:
        wanted = ("weight", "weight_scale_inv") if "weight_scale_inv" in found else ("weight",)
    for part in wanted:
        if part not in found:
            raise CheckpointError(
                f"{_part_name(name, part)}: missing from the checkpoint", "Fetch the whole checkpoint."
            )
    for part in found:
        if part not in wanted:
            raise CheckpointError(f"{found[part]}: stands beside {found[wanted[0]]}, which it does not fit")
    return SourceTensor(name, shape, found)


def _part_name(name: str, part: str) -> str:
    return name if part == "weight" else name.removesuffix("weight") + part


def check_quantization(raw: Mapping[str, Any], source: str = "config.json") -> None:
    """Refuse a `config.json` object whose `quantization_config` moebox cannot read; absent is fine.

    Raises:
        CheckpointError: it names another method, block, group or bit width.
    """
    text = raw.get("text_config", {})
    quantization = raw.get("quantization_config") or text.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method")
    if method == "fp8":
        _expect(source, quantization, {"fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]})
    elif method == "compressed-tensors":
        _expect(source, quantization, {"format": "pack-quantized"})
        for name, group in (quantization.get("config_groups") or {}).items():
            expected = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
            _expect(
                f"{source}: {name}", group.get("weights") or {}, expected | {"group_size": GROUP_SIZE}, True
            )
            _expect(f"{source}: {name}", group.get("weights") or {}, {"actorder": None})
    else:
        raise CheckpointError(f"{source}: quant_method {method!r} is not one that moebox reads", _READABLE)


def _expect(
    source: str, found: Mapping[str, Any], expected: Mapping[str, Any], required: bool = False
) -> None:
    for name, value in expected.items():
        if found.get(name, None if required else value) != value:
            raise CheckpointError(
                f"{source}: quantization {name} = {found.get(name)!r}, moebox reads {value!r} only", _READABLE
            )


def check_source(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> Encoding:
    """Check dtypes and shapes of a source tensor's parts against the config, from headers alone.

    Args:
        source: from `take_inventory`.
        infos: source tensor name -> where it lies, with at least the parts of `source`.

    Raises:
        CheckpointError: a part is missing, or has a shape or dtype that does not fit; it is named.
    """
    if "weight_packed" in source.parts:
        _check_int4(source, infos)
        return "int4"
    weight = _part(source, "weight", infos)
    _check_shape(weight, source.shape)
    scaled = "weight_scale_inv" in source.parts
    if weight.dtype == "F8_E4M3":
        if not scaled:
            raise CheckpointError(
                f"{weight.file}: {weight.name}: is FP8, but {weight.name}_scale_inv is missing",
                "Fetch the whole checkpoint.",
            )
        scale = _part(source, "weight_scale_inv", infos)
        _check_dtype(scale, "F32")
        _check_shape(scale, tuple(ceil(size / FP8_BLOCK) for size in source.shape))
        return "fp8"
    _check_dtype(weight, "BF16", "F16", "F32")
    if scaled:
        raise CheckpointError(f"{weight.file}: {weight.name}: is {weight.dtype}, but has a weight_scale_inv")
    return "plain"


def _check_int4(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> None:
    rows, columns = source.shape
    packed, scale, shape = (
        _part(source, part, infos) for part in ("weight_packed", "weight_scale", "weight_shape")
    )
    _check_dtype(packed, "I32")
    _check_shape(packed, (rows, ceil(columns / 8)))
    _check_dtype(scale, "BF16")
    groups = ceil(columns / GROUP_SIZE)
    if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] not in (0, groups):
        group = columns / scale.shape[1]
        raise CheckpointError(
            f"{scale.file}: {scale.name}: shape {list(scale.shape)} means groups of {group:g} columns, "
            f"moebox reads groups of {GROUP_SIZE}",
            _READABLE,
        )
    _check_shape(scale, (rows, groups))
    _check_dtype(shape, "I32", "I64")
    _check_shape(shape, (2,))


def _part(source: SourceTensor, part: str, infos: Mapping[str, TensorInfo]) -> TensorInfo:
    name = source.parts[part]
    if name not in infos:
        raise CheckpointError(f"{name}: missing from the checkpoint", "Fetch the whole checkpoint.")
    return infos[name]


def _check_dtype(info: TensorInfo, *allowed: str) -> None:
    if info.dtype not in allowed:
        raise CheckpointError(
            f"{info.file}: {info.name}: dtype {info.dtype}, expected {' or '.join(allowed)}", _READABLE
        )


def _check_shape(info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != expected:
        raise CheckpointError(
            f"{info.file}: {info.name}: shape {list(info.shape)} contradicts config.json, "
            f"which implies {list(expected)}",
            "Check that config.json belongs to these files.",
        )


def read_expert(
    sources: Sequence[SourceTensor], infos: Mapping[str, TensorInfo], *, threads: int = 1
) -> list[Int4Matrix]:
    """The INT4 matrices of one expert: quantized, or passed through bit for bit if the source is INT4.

    Args:
        sources: gate, up and down of an expert, from `Inventory.experts`.
        infos: source tensor name -> where it lies.
        threads: that quantize one matrix at a time; the result does not depend on it.

    Raises:
        CheckpointError: as `check_source`, or a weight or scale is NaN or Inf (file, tensor, position).
    """
    return [_read_int4(source, infos, threads) for source in sources]


def _read_int4(source: SourceTensor, infos: Mapping[str, TensorInfo], threads: int) -> Int4Matrix:
    if check_source(source, infos) == "int4":
        return _open_int4(source, infos)
    weight, scale_inv = _open_weight(source, infos)
    try:
        return quantize_int4(weight, scale_inv, threads=threads)
    except NonFiniteError as error:
        raise _located(error, infos[source.parts["weight"]]) from None


def _open_weight(
    source: SourceTensor, infos: Mapping[str, TensorInfo]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = open_tensor(_part(source, "weight", infos))
    if "weight_scale_inv" not in source.parts:
        return weight, None
    return weight, _open_finite(_part(source, "weight_scale_inv", infos))


def _open_finite(info: TensorInfo) -> torch.Tensor:
    tensor = open_tensor(info)
    try:
        check_finite(tensor)
    except NonFiniteError as error:
        raise _located(error, info) from None
    return tensor


def _open_int4(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> Int4Matrix:
    shape = _part(source, "weight_shape", infos)
    stored = tuple(open_tensor(shape).tolist())
    if stored != source.shape:
        raise CheckpointError(
            f"{shape.file}: {shape.name}: says {list(stored)}, config.json implies {list(source.shape)}"
        )
    scale = _open_finite(_part(source, "weight_scale", infos))
    return Int4Matrix(open_tensor(_part(source, "weight_packed", infos)), scale, QuantError(0.0, 0.0, 0.0))


def read_backbone(source: SourceTensor, infos: Mapping[str, TensorInfo], *, threads: int = 1) -> torch.Tensor:
    """A tensor outside the routed experts, as the output stores it.

    Everything becomes bf16, rounded to nearest even (a router that the source keeps in F32 too), except
    `e_score_correction_bias`, which stays F32. Tensors that need no conversion are views of the file.

    Raises:
        CheckpointError: as `check_source`, or a value or scale is NaN or Inf (file, tensor, position).
    """
    if check_source(source, infos) == "int4":
        matrix = _open_int4(source, infos)
        return dequantize(matrix.packed, matrix.scale)
    info = infos[source.parts["weight"]]
    if source.name.endswith("e_score_correction_bias"):
        return _open_finite(info).float()
    weight, scale_inv = _open_weight(source, infos)
    try:
        return to_bfloat16(weight, scale_inv, threads=threads)
    except NonFiniteError as error:
        raise _located(error, info) from None


def _located(error: NonFiniteError, info: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"{info.file}: {info.name}: {error.what}", "The file is damaged; fetch it again and check its hash."
    )
