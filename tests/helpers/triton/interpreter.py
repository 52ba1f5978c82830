"""Corrects errors of Triton 3.6's interpreter. Import it before any kernel.

- The interpreter multiplies bf16 operands of a dot as the integers that hold their bits.
- It turns fp32 into bf16 by cutting bits off, and slowly; a GPU rounds to nearest even.
- A loop's bound that was loaded from memory is an array of one element, which NumPy 2.4 refuses as
  an integer.
- An integer has no remainder by a `tl.constexpr`; Triton's compiler computes it.
"""

from __future__ import annotations

import os

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_convert_any = interpreter._convert_float
_dot_any = interpreter.InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor


def _convert(values, source, target, rounding):
    if (source, target) == (tl.bfloat16, tl.float32):
        return values.view(np.uint16).astype(np.uint32) << 16
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return _convert_any(values, source, target, rounding)


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(
        _convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
    )


def _dot(self, a, b, d, *precision):
    return _dot_any(self, _widened(a), _widened(b), d, *precision)


def _patch(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._convert_float = _convert
interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang_tensor = _patch
tl.constexpr.__rmod__ = lambda self, other: other % self.value
