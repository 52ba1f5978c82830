"""Precision of the backbone when it is loaded: bf16, or int8 and nf4 through bitsandbytes.

int8 and nf4 apply to the matrices of attention, shared experts, dense layers and head. `kv_b_proj` stays in
bf16, because absorbed attention multiplies by its parts for each head, not as a Linear. The embedding stays
in bf16, because its rows are looked up. Router and norms are small, and stay in fp32.

int8 is LLM.int8() (arXiv 2208.07339): activations are quantized too, except outliers above 6. nf4 is
QLoRA's NormalFloat (arXiv 2305.14314) in blocks of 64, with quantized block scales. On the CPU bitsandbytes
0.50 computes wrong products where the number of inputs is no multiple of 64, and on a CPU with BF16
instructions it refuses a number of outputs that is no multiple of 32. Such matrices stay in bf16 on every
machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from moebox.errors import PlanError
from moebox.runtime.model.kimi_k2 import PACKED

PRECISIONS = ("bf16", "int8", "nf4")
NF4_BLOCK = 64
"""The number of inputs of an nf4 matrix is a multiple of this."""
NF4_OUTPUTS = 32
"""The number of outputs of an nf4 matrix is a multiple of this."""
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Four bits, an 8-bit scale for each block of 64, and an fp32 scale for each 256 blocks."""

_QUANTIZED = re.compile(
    r"lm_head$|self_attn\.(q_kv_a_proj|q_b_proj|o_proj)$|mlp\.(shared_experts\.)?(gate_up_proj|down_proj)$"
)


def check_precision(backbone: str) -> None:
    """Raise `PlanError` unless `backbone` is one of `PRECISIONS`."""
    if backbone not in PRECISIONS:
        raise PlanError(
            f"backbone precision {backbone!r} is unknown", f"Choose one of {', '.join(PRECISIONS)}."
        )


def is_quantized(module_name: str, shape: Sequence[int], backbone: str) -> bool:
    """Whether the module of this name, with a weight of shape [out, in], is quantized in this precision."""
    if backbone == "bf16" or _QUANTIZED.search(module_name) is None:
        return False
    return backbone == "int8" or (shape[1] % NF4_BLOCK == 0 and shape[0] % NF4_OUTPUTS == 0)


def parameter_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter, with the scales that bitsandbytes keeps beside it."""
    extras = [getattr(parameter, "SCB", None)]
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        extras += [state.absmax, state.state2.absmax if state.nested else None]
    return parameter.nbytes + sum(extra.nbytes for extra in extras if isinstance(extra, Tensor))


def keeps_fp32(module_name: str) -> bool:
    """Whether a module is a norm or the router, which are kept in fp32."""
    return module_name.endswith(("norm", ".gate"))


def planned_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, backbone: str) -> int:
    """Bytes that a backbone takes in this precision.

    Args:
        shapes: tensor's name -> shape.
        dtype: of the matrices that are not quantized.
        backbone: one of `PRECISIONS`.
    """
    total = 0.0
    for name, shape in _parameter_shapes(shapes).items():
        module, elements = name.rpartition(".")[0], math.prod(shape)
        if not is_quantized(module, shape, backbone):
            total += elements * (4 if keeps_fp32(module) else dtype.itemsize)
        else:
            total += elements + 4 * shape[0] if backbone == "int8" else elements * NF4_BYTES_PER_WEIGHT
    return int(total)


def _parameter_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters, some of which stack the rows of several tensors of a checkpoint."""
    wholes = {part: whole for whole, parts in PACKED.items() for part in parts} | {"q_proj": "q_kv_a_proj"}
    parameters: dict[str, tuple[int, ...]] = {}
    for name, (rows, *rest) in shapes.items():
        module, _, attribute = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        parameter = f"{parent}.{wholes.get(last, last)}.{attribute}"
        parameters[parameter] = (parameters.get(parameter, (0,))[0] + rows, *rest)
    return parameters
