"""Checks that this machine's GPU kernels compute what they should.

The kernels are compiled on the user's machine, by the Triton release and driver that it has. One release of
Triton miscompiled a correct kernel. So before a model answers anything, each kernel computes one of its
experts, and the result is compared with plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.errors import DeviceError
from moebox.kernels.gpu.reference import ops as torch_ops
from moebox.offload.device.base import Device
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.ram_slab import RamSlab

LARGEST_ERROR = 0.02
"""Relative L2 error. Kernels for many tokens round to bf16, and their error is below 0.005."""
TINY = 1e-6
"""Least norm to which an error is relative, for an expert whose weights are all zero."""
TOKENS = 40
"""Two tiles of the kernel for many tokens, of which the second is not full."""


def check_expert_kernels(
    device: Device, ram: RamSlab, gpu: GpuSlab, shape: tuple[int, int], top_k: int
) -> None:
    """Compare `experts_one`, `experts_many` and `split_expert` with plain torch, on RAM's first expert.

    Overwrites the first slot of the ring, which nothing else may use meanwhile.

    Args:
        shape: of an expert, (H, I).
        top_k: k, the length of the lists that `experts_one` reads.

    Raises:
        DeviceError: a kernel is wrong; the message has its name and the error.
    """
    slot = gpu.ring_slot(0)
    device.uploads.copy(gpu.slab[slot], ram.slab[0])
    device.uploads.record().synchronize()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, shape[0], generator=generator).bfloat16().to(device.torch_device)
    _compare("experts_many", *_many(device, gpu.slab, slot, shape, hidden))
    _compare("experts_one", *_one(device, gpu.slab, slot, shape, hidden[0], top_k))
    _compare("split_expert", *_part(device, ram.slab, shape, hidden[0]))


def _many(
    device: Device, slab: Tensor, slot: int, shape: tuple[int, int], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    place = hidden.device
    slots = torch.tensor([slot], dtype=torch.int32, device=place)
    offsets = torch.tensor([0, TOKENS], dtype=torch.int32, device=place)
    tokens = torch.arange(TOKENS, dtype=torch.int32, device=place)
    weights = torch.ones(TOKENS, device=place)
    got, expected = (torch.zeros(TOKENS, shape[0], device=place) for _ in range(2))
    for ops, out in ((device.ops, got), (torch_ops, expected)):
        ops.experts_many(slab, shape, slots, offsets, tokens, weights, hidden, out)
    return got, expected


def _one(
    device: Device, slab: Tensor, slot: int, shape: tuple[int, int], hidden: Tensor, top_k: int
) -> tuple[Tensor, Tensor]:
    listed, weights = device.pinned((1 + top_k,), torch.int32), device.pinned((top_k,), torch.float32)
    listed[:2] = torch.tensor([1, slot])
    weights[0] = 1.0
    got, expected = (torch.full((shape[0],), float("nan"), device=hidden.device) for _ in range(2))
    for ops, out in ((device.ops, got), (torch_ops, expected)):
        ops.experts_one(slab, shape, listed, weights, hidden, out)
    return got, expected


def _part(device: Device, ram: Tensor, shape: tuple[int, int], hidden: Tensor) -> tuple[Tensor, Tensor]:
    part, weight = device.pinned((4,), torch.int32), device.pinned((1,), torch.float32)
    part[1] = max(shape[1] // 64, 1) * 32
    weight[0] = 1.0
    got, expected = (torch.zeros(shape[0], device=hidden.device) for _ in range(2))
    device.ops.split_expert(ram, shape, part, weight, hidden, got)
    torch_ops.split_expert(ram[:1].to(hidden.device), shape, part, weight, hidden, expected)
    return got, expected


def _compare(kernel: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).norm() / expected.norm().clamp_min(TINY))
    if not error <= LARGEST_ERROR:  # NaN too
        raise DeviceError(
            f"GPU kernel {kernel}: relative error {error:.3g} against plain torch, limit {LARGEST_ERROR}",
            "This version of Triton compiles it wrongly: install another one, or use --device cpu.",
        )
