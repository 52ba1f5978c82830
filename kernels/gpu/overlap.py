"""Kernels that start while the one before them still runs (programmatic dependent launch, from Hopper on).

A kernel of a decode step lasts a few microseconds, and one or two more pass between two kernels of a graph.
A kernel launched with `launch_options()` is on the device before its predecessor ends: it reads weights, then
calls `after_previous`, and only then touches what other kernels write. Every program of such a kernel has to
call it, or a successor would see the writes of kernels further back too early.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = (9, 0)


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait for the kernel before, and for all before it; then let the kernel after start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def launch_options() -> dict[str, bool]:
    """A launch's options, and the kernel's constant `OVERLAP`, for the current device."""
    overlap = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_CAPABILITY
    return {"OVERLAP": overlap, "launch_pdl": overlap}
