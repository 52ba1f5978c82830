"""Random INT4 experts, and their outputs computed in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moebox.config import GROUP_SIZE
from moebox.kernels import cpu


@dataclass(frozen=True)
class Routing:
    """Which expert gets which tokens: `experts_forward`'s offsets, tokens and weights."""

    offsets: Tensor
    tokens: Tensor
    weights: Tensor


def random_matrix(rows: int, columns: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Packed int32 [rows, columns/8] and bf16 scales [rows, columns/32] that keep outputs near 1."""
    packed = torch.empty(rows, columns // 8, dtype=torch.int32)
    packed.random_(-(2**31), 2**31 - 1, generator=generator)
    scale = torch.rand(rows, columns // GROUP_SIZE, generator=generator)
    return packed, ((0.05 + 0.35 * scale) / columns**0.5).bfloat16()


def random_arrays(hidden: int, inner: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """The six arrays of one expert."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [array for rows, columns in shapes for array in random_matrix(rows, columns, generator)]


def random_routing(
    counts: list[int], n_tokens: int, generator: torch.Generator | None = None, repeat: bool = False
) -> Routing:
    """`counts[i]` random tokens for expert i, distinct within an expert unless `repeat`."""
    chosen = [
        torch.randint(0, n_tokens, (count,), generator=generator)
        if repeat
        else torch.randperm(n_tokens, generator=generator)[:count]
        for count in counts
    ]
    tokens = torch.cat([torch.empty(0, dtype=torch.int64), *chosen]).int()
    return Routing(
        torch.tensor([0, *counts]).cumsum(0).int(), tokens, torch.rand(len(tokens), generator=generator)
    )


def dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """fp64 [out, in]."""
    nibbles = packed.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32)) & 15
    return (nibbles.flatten(1) - 8).double() * scale.double().repeat_interleave(GROUP_SIZE, 1)


def reference(arrays: list[list[Tensor]], routing: Routing, hidden: Tensor, out: Tensor) -> Tensor:
    """The value that `experts_forward` should give `out`, in fp64."""
    total = out.double()
    x = hidden.double()
    bounds = routing.offsets.tolist()
    for expert, begin, end in zip(arrays, bounds[:-1], bounds[1:], strict=True):
        if begin == end:
            continue
        tokens = routing.tokens[begin:end].long()
        gate, up, down = (dequantize(*expert[i : i + 2]) for i in (0, 2, 4))
        inner = torch.nn.functional.silu(x[tokens] @ gate.T) * (x[tokens] @ up.T)
        total.index_add_(0, tokens, routing.weights[begin:end].double().unsqueeze(1) * (inner @ down.T))
    return total


def relative_error(arrays: list[list[Tensor]], routing: Routing, hidden: Tensor, isa: str | None) -> float:
    """Relative L2 error of `experts_forward` with an instruction set, against `reference`."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    experts = [cpu.Expert(*expert) for expert in arrays]
    pool = cpu.ThreadPool()
    cpu.experts_forward(pool, experts, routing.offsets, routing.tokens, routing.weights, hidden, out, isa)
    expected = reference(arrays, routing, hidden, torch.zeros_like(out))
    return float((out.double() - expected).norm() / expected.norm())
