"""int8 and nf4 matrices through bitsandbytes, which only this module imports."""

from __future__ import annotations

import logging

import bitsandbytes as bnb
from torch import Tensor, nn

OUTLIER_THRESHOLD = 6.0


class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' int8 Linear with fp32 inputs: four times as fast on CPUs without bf16 instructions."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [T, in] -> [T, out]`, in x's dtype."""
        return super().forward(x.float()).to(x.dtype)  # type: ignore[no-any-return]


def quantize_linear(weight: Tensor, backbone: str) -> nn.Module:
    """A bitsandbytes Linear on the CPU that holds `weight [out, in]` as "int8" or "nf4"."""
    rows, columns = weight.shape
    if backbone == "int8":
        return _int8_linear(weight, rows, columns)
    module: nn.Module = bnb.nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    parameter = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=module)
    module.weight = parameter.to("cpu")  # this call quantizes
    return module


def _int8_linear(weight: Tensor, rows: int, columns: int) -> nn.Module:
    # bitsandbytes warns at every call that fp32 inputs are rounded to fp16 before they become int8.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    module = Int8Linear(
        columns, rows, bias=False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    parameter = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    module.weight = parameter.to("cpu")
    return module
