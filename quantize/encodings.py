"""How checkpoints of the family store a matrix: the names of its parts, and the keys of `config.json` for it.

A matrix W [out, in] is stored as one of

    plain  weight BF16, F16 or F32 [out, in]
    fp8    weight F8_E4M3 [out, in], weight_scale_inv F32 [ceil(out/128), ceil(in/128)]:
           W[i, j] = weight[i, j] * weight_scale_inv[i // 128, j // 128]
    int4   weight_packed I32 [out, in/8], weight_scale BF16 [out, in/32], weight_shape int [2]: see `int4.py`

One expert's INT4 bytes, as every tier holds them, are laid out in `offload/checkpoint/layout.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from moebox import _kernels
from moebox.config import GROUP_SIZE

Encoding = Literal["fp8", "plain", "int4"]

PARTS: dict[Encoding, tuple[str, ...]] = {
    "fp8": ("weight", "weight_scale_inv"),
    "plain": ("weight",),
    "int4": ("weight_packed", "weight_scale", "weight_shape"),
}
"""Encoding -> what follows the module's name in the names of its tensors."""

BIAS_SUFFIX = ".e_score_correction_bias"
"""The only tensors of the backbone that stay F32: routers add them to their scores before they pick."""

FP8_BLOCK = _kernels.FP8_BLOCK
"""Rows and columns that share one `weight_scale_inv`: 128."""

FP8_QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
"""`quantization_config` of the family's FP8 checkpoints, as published with Kimi-K2-Instruct."""

INT4_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP_SIZE,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "observer": "minmax",
    "observer_kwargs": {},
}
INT4_QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": INT4_WEIGHTS,
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
}
"""`quantization_config` of the family's INT4 checkpoints, as published with Kimi-K2.5."""
