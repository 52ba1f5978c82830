"""Kernels that start while those before them still run (programmatic dependent launch, from Hopper on).

A kernel of a decode step lasts a few microseconds, and one or two more pass between two kernels of a graph.
A kernel launched with `launch_options()` is on the device before its predecessors end: it lets its own
successor start (`start_next`), reads weights, then waits (`after_previous`), and only then touches what other
kernels read or write. Every program of such a kernel has to wait, even one with nothing left to do: what
comes after takes a kernel's end for the end of all before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

FIRST_CAPABILITY = (9, 0)


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the next kernel's programs start as soon as all of this one's have."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait until all kernels before this one have ended, and see what they wrote."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@cache
def launch_options() -> dict[str, bool]:
    """A launch's options, and the kernel's constant `OVERLAP`, for the current device."""
    overlap = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FIRST_CAPABILITY
    return {"OVERLAP": overlap, "launch_pdl": overlap}
