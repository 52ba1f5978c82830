"""Source tensors of every encoding: check their headers, then read their data.

A tensor's encoding follows from its parts (`SourceTensor.encoding`); one checkpoint may mix encodings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch

from moebox.config import CONFIG_FILE, GROUP_SIZE
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import TensorInfo, open_tensor
from moebox.quantize.encodings import (
    BIAS_SUFFIX,
    FP8_BLOCK,
    FP8_QUANTIZATION,
    INT4_QUANTIZATION,
    INT4_WEIGHTS,
    PARTS,
    Encoding,
)
from moebox.quantize.int4 import (
    Int4Matrix,
    NonFiniteError,
    QuantError,
    check_finite,
    dequantize,
    quantize_int4,
    to_bfloat16,
)
from moebox.quantize.source.inventory import READABLE, SourceTensor


def check_quantization(raw: Mapping[str, Any], source: str = CONFIG_FILE) -> None:
    """Refuse a `config.json` object whose `quantization_config`, if it has one, moebox cannot read.

    Raises:
        CheckpointError: it names another method, block, group or bit width.
    """
    text = raw.get("text_config", {})
    quantization = raw.get("quantization_config") or text.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method")
    if method == FP8_QUANTIZATION["quant_method"]:
        _expect(source, quantization, FP8_QUANTIZATION, ("fmt", "weight_block_size"))
    elif method == INT4_QUANTIZATION["quant_method"]:
        _expect(source, quantization, INT4_QUANTIZATION, ("format",))
        for name, group in (quantization.get("config_groups") or {}).items():
            weights = group.get("weights") or {}
            _expect(f"{source}: {name}", weights, INT4_WEIGHTS, _REQUIRED_OF_INT4, required=True)
            _expect(f"{source}: {name}", weights, INT4_WEIGHTS, ("actorder",))
    else:
        raise CheckpointError(f"{source}: quant_method {method!r} is not one that moebox reads", READABLE)


_REQUIRED_OF_INT4 = ("num_bits", "type", "symmetric", "strategy", "group_size")


def _expect(
    source: str,
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    names: Sequence[str],
    *,
    required: bool = False,
) -> None:
    for name in names:
        value = expected[name]
        if found.get(name, None if required else value) != value:
            raise CheckpointError(
                f"{source}: quantization {name} = {found.get(name)!r}, moebox reads {value!r} only", READABLE
            )


def check_source(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> Encoding:
    """Check dtypes and shapes of a source tensor's parts, by their headers, and return its encoding.

    Args:
        source: from `take_inventory`.
        infos: source tensor name -> where it lies, for the parts of `source` at least.

    Raises:
        CheckpointError: a part is missing, or its shape or dtype does not fit; the message names it.
    """
    if source.encoding == "int4":
        _check_int4(source, infos)
    else:
        _check_weight(source, infos)
    return source.encoding


def _check_weight(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> None:
    weight = _part(source, "weight", infos)
    _check_shape(weight, source.shape)
    scaled = source.encoding == "fp8"
    if weight.dtype != "F8_E4M3":
        _check_dtype(weight, "BF16", "F16", "F32")
        if scaled:
            raise CheckpointError(
                f"{weight.file}: {weight.name}: is {weight.dtype}, but has a weight_scale_inv"
            )
    elif not scaled:
        raise CheckpointError(
            f"{weight.file}: {weight.name}: is FP8, but {weight.name}_scale_inv is missing",
            "Fetch the whole checkpoint.",
        )
    else:
        scale = _part(source, "weight_scale_inv", infos)
        _check_dtype(scale, "F32")
        _check_shape(scale, tuple(ceil(size / FP8_BLOCK) for size in source.shape))


def _check_int4(source: SourceTensor, infos: Mapping[str, TensorInfo]) -> None:
    rows, columns = source.shape
    packed, scale, shape = (_part(source, part, infos) for part in PARTS["int4"])
    _check_dtype(packed, "I32")
    _check_shape(packed, (rows, ceil(columns / 8)))
    _check_dtype(scale, "BF16")
    groups = ceil(columns / GROUP_SIZE)
    if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] not in (0, groups):
        group = columns / scale.shape[1]
        raise CheckpointError(
            f"{scale.file}: {scale.name}: shape {list(scale.shape)} means groups of {group:g} columns, "
            f"moebox reads groups of {GROUP_SIZE}",
            READABLE,
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
            f"{info.file}: {info.name}: dtype {info.dtype}, expected {' or '.join(allowed)}", READABLE
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
    """The INT4 matrices of one expert: quantized, or the source's own where it is INT4 already.

    Args:
        sources: gate, up and down of an expert, from `Inventory.experts`.
        infos: source tensor name -> where it lies.
        threads: how many quantize each matrix; the result does not depend on it.

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
    if source.encoding != "fp8":
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

    Tensors become bf16, rounded to nearest even, routers in F32 included; `e_score_correction_bias` becomes
    F32. A tensor that has that type already is a view of the file.

    Raises:
        CheckpointError: as `check_source`, or a value or scale is NaN or Inf (file, tensor, position).
    """
    if check_source(source, infos) == "int4":
        matrix = _open_int4(source, infos)
        return dequantize(matrix.packed, matrix.scale)
    info = infos[source.parts["weight"]]
    if source.name.endswith(BIAS_SUFFIX):
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
