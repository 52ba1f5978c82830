"""Compile what a call would launch, for a Hopper GPU and on a machine without one.

The interpreter runs Python; Triton compiles less than that. Import this before any kernel, in a process that
does not interpret them.
"""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)

compiled: dict[str, str] = {}
"""Kernel's name -> the PTX of its last variant."""

_run = JITFunction.run


def _compile(self, *args, grid, warmup, **options):
    kernel = _run(self, *args, grid=grid, warmup=True, **options)
    compiled[self.__name__] = kernel.asm["ptx"]


JITFunction.run = _compile
driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: HOPPER,
    )
)
