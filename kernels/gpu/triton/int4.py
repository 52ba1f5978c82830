"""What the INT4 kernels share: where an expert's matrices stand in its bytes.

Packed words are int32 of eight values, and one bf16 scale belongs to a group of 32 values: four words. All
INT4 kernels count on these sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox import config

GROUP_SIZE = tl.constexpr(config.GROUP_SIZE)
"""Values that share a scale."""


@triton.jit
def matrix_pointers(base, MATRIX: tl.constexpr, SIZE: tl.constexpr):
    """Pointers to words and scales of an expert's matrix 0 (gate), 1 (up) or 2 (down), of SIZE values."""
    start = base + MATRIX * (SIZE // 2 + SIZE // GROUP_SIZE * 2)
    return start.to(tl.pointer_type(tl.int32)), (start + SIZE // 2).to(tl.pointer_type(tl.bfloat16))
