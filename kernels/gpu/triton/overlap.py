"""Kernels that start while the kernels before them still run (programmatic dependent launch, since Hopper).

A kernel of a decode step lasts a few microseconds, and one or two microseconds pass between two kernels of a
graph. A kernel that is launched with `launch_options()` is on the device before its predecessors end. It lets
its own successor start (`start_next`), reads weights, then waits (`after_previous`), and only then reads or
writes what other kernels write or read. Every program of such a kernel must wait, even one that has nothing
to do: later kernels rely on a kernel's end meaning the end of all kernels before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = (9, 0)
"""The first compute capability that has it: Hopper."""


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the next kernel's programs start as soon as all programs of this kernel have called this."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait until all kernels before this one have ended and what they wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@cache
def launch_options() -> dict[str, bool]:
    """Options of a launch for the current device, with the value of the kernels' constant `OVERLAP`."""
    overlap = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_CAPABILITY
    return {"OVERLAP": overlap, "launch_pdl": overlap}
