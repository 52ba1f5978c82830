"""Picks the implementation of `Ops` for a device."""

from __future__ import annotations

import torch

from moebox.kernels.gpu.base import Ops


def load_ops(device: torch.device) -> Ops:
    """The operations for tensors on `device`: Triton's on a GPU, plain torch's on the CPU.

    Triton is imported only where it is used: a box without a GPU may lack it.
    """
    if device.type == "cuda":
        from moebox.kernels.gpu.triton import ops as triton_ops

        return triton_ops
    from moebox.kernels.gpu.reference import ops as torch_ops

    return torch_ops
