"""Units of bytes and rates, and the arithmetic on them that several packages share."""

from __future__ import annotations

GIGA = 1e9
"""Bytes or operations a second in GB/s or GFLOP/s."""
TERA = 1e12
"""Operations a second in TFLOP/s."""
PAGE_BYTES = 4096
"""Of memory, and the alignment of experts on disk: a multiple of what O_DIRECT asks for."""


def ceil_div(dividend: int, divisor: int) -> int:
    """`dividend / divisor`, rounded up."""
    return -(-dividend // divisor)


def gib(nbytes: float) -> str:
    """`nbytes` as text, in GiB or, if small, in MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
