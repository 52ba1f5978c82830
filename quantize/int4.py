"""INT4 weights in groups of 32: quantizing, packing, unpacking (compressed-tensors `pack-quantized`).

A weight is `q * scale`, q in -8..7, with one bf16 scale for 32 neighbouring columns of a row. Eight
values make an int32, the first in the low nibble, as q + 8. A scale may be negative: the value of largest
magnitude then takes -8 whatever its sign, which a positive scale allows to negative values only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from moebox import _kernels
from moebox.config import GROUP_SIZE
from moebox.errors import CheckpointError
from moebox.quantize.encodings import FP8_BLOCK

_DTYPE_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class QuantError:
    """Error of quantized weights: sums over all weights, and the largest absolute error of one."""

    sum_sq_error: float
    sum_sq: float
    max_abs: float

    @property
    def rel_rms(self) -> float:
        """Root of the summed squared error over the root of the summed squared weights."""
        return math.sqrt(self.sum_sq_error / self.sum_sq) if self.sum_sq else 0.0

    def __add__(self, other: QuantError) -> QuantError:
        return QuantError(
            self.sum_sq_error + other.sum_sq_error,
            self.sum_sq + other.sum_sq,
            max(self.max_abs, other.max_abs),
        )


@dataclass(frozen=True)
class Int4Matrix:
    """packed int32 [out, in/8], scale bf16 [out, in/32], and the error against the source."""

    packed: torch.Tensor
    scale: torch.Tensor
    error: QuantError


class NonFiniteError(CheckpointError):
    """A weight or scale is NaN, Inf or too large for a trained weight; the message says at which position."""


def quantize_int4(
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> Int4Matrix:
    """Quantize a matrix to INT4 with groups of 32 along its rows, by least squared error.

    For each group, scales from a grid around its extreme value are tried with the values they imply, the
    best few are refitted by least squares, and the bf16 scale of least squared error is kept. A group
    of zeros gets a small positive scale. Result and error are the same for any `threads` and `isa`.

    Args:
        weight: [out, in], float8_e4m3fn, bfloat16, float16 or float32, `in` a multiple of 32.
        scale_inv: float32 [ceil(out/128), ceil(in/128)], factors of a float8 weight; else None.
        threads: how many share the rows.
        isa: a path of `moebox.kernels.cpu.isa_paths()`; the best one by default.

    Raises:
        NonFiniteError: a dequantized weight is NaN, Inf or at least 2**60.
        ValueError: shapes or dtypes do not fit, or this machine cannot run `isa`.
    """
    rows, columns = _check_matrix(weight, scale_inv)
    if columns % GROUP_SIZE:
        raise ValueError(f"weight has {columns} columns, no multiple of {GROUP_SIZE}")
    packed = torch.empty(rows, columns // 8, dtype=torch.int32)
    scale = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.bfloat16)
    bad_row, bad_column, sum_sq_error, sum_sq, max_abs = _kernels.quantize_int4(
        _bytes(weight),
        _DTYPE_NAMES[weight.dtype],
        None if scale_inv is None else scale_inv.contiguous().numpy(),
        packed.numpy(),
        scale.view(torch.uint16).numpy(),
        threads,
        isa,
    )
    if bad_row >= 0:
        raise _non_finite(weight, scale_inv, bad_row, bad_column)
    return Int4Matrix(packed, scale, QuantError(sum_sq_error, sum_sq, max_abs))


def to_bfloat16(
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    *,
    threads: int = 1,
    isa: str | None = None,
) -> torch.Tensor:
    """A tensor as bfloat16, rounded to nearest even; a bfloat16 tensor is returned itself, once checked.

    Args:
        weight: [in] or [out, in], float8_e4m3fn, bfloat16, float16 or float32.
        scale_inv: as in `quantize_int4`: W[i, j] = float(weight[i, j]) * scale_inv[i // 128, j // 128].
        threads, isa: as in `quantize_int4`.

    Raises:
        NonFiniteError: a value is NaN, Inf or overflows bfloat16.
        ValueError: shapes or dtypes do not fit, or this machine cannot run `isa`.
    """
    matrix = weight if weight.ndim == 2 else weight.reshape(1, -1)
    _check_matrix(matrix, scale_inv)
    converted = None if weight.dtype == torch.bfloat16 else torch.empty(matrix.shape, dtype=torch.bfloat16)
    bad_row, bad_column = _kernels.to_bfloat16(
        _bytes(matrix),
        _DTYPE_NAMES[weight.dtype],
        None if scale_inv is None else scale_inv.contiguous().numpy(),
        None if converted is None else converted.view(torch.uint16).numpy(),
        threads,
        isa,
    )
    if bad_row >= 0:
        raise _non_finite(weight, scale_inv, bad_row, bad_column)
    return weight if converted is None else converted.view(weight.shape)


def _check_matrix(weight: torch.Tensor, scale_inv: torch.Tensor | None) -> tuple[int, int]:
    if weight.ndim != 2 or weight.dtype not in _DTYPE_NAMES:
        raise ValueError(f"weight is {weight.dtype} {list(weight.shape)}, must be a float matrix")
    if (weight.dtype == torch.float8_e4m3fn) != (scale_inv is not None):
        raise ValueError(f"scale_inv goes with float8 weights, weight is {weight.dtype}")
    blocks = [math.ceil(size / FP8_BLOCK) for size in weight.shape]
    if scale_inv is not None and (list(scale_inv.shape) != blocks or scale_inv.dtype != torch.float32):
        raise ValueError(
            f"scale_inv is {scale_inv.dtype} {list(scale_inv.shape)}, must be float32 {blocks} "
            f"for a weight of {list(weight.shape)}"
        )
    return weight.shape[0], weight.shape[1]


def _bytes(weight: torch.Tensor) -> Any:
    """The matrix as a uint8 [out, row bytes] array on the same memory."""
    return weight.contiguous().view(torch.uint8).numpy()


def _non_finite(
    weight: torch.Tensor, scale_inv: torch.Tensor | None, row: int, column: int
) -> NonFiniteError:
    position = (row, column) if weight.ndim == 2 else (column,)
    value = weight[position].float().item()
    factor = "" if scale_inv is None else f" x {scale_inv[row // FP8_BLOCK, column // FP8_BLOCK].item():g}"
    return NonFiniteError(f"{list(position)} is {value:g}{factor}, not a finite weight")


def check_finite(tensor: torch.Tensor) -> None:
    """Raise `NonFiniteError` for the first NaN or Inf of `tensor`, if it has one."""
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        raise NonFiniteError(f"{position} is {tensor[tuple(position)].item():g}, not finite")


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack integers -8..7 [out, in] into int32 [out, in/8]; `in` a multiple of 8."""
    nibbles = (values.to(torch.int64) + 8).view(values.shape[0], -1, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: int32 [out, in/8] -> int8 [out, in] of -8..7."""
    data = packed.contiguous().view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1)
    return nibbles.view(packed.shape[0], -1).to(torch.int8) - 8


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """W[o, i] = q[o, i] * scale[o, i // 32] as `dtype` [out, in], the product taken in `dtype`."""
    values = unpack(packed).to(dtype).view(*scale.shape, -1)
    return (values * scale.to(dtype)[:, :, None]).view(packed.shape[0], -1)
