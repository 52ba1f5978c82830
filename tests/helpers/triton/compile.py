"""Makes each launch of a Triton kernel compile it for a Hopper GPU instead; needs no GPU.

Triton's interpreter accepts more of Python than its compiler. Import this before any kernel, in a process
that does not use the interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)

compiled: dict[str, str] = {}
"""The PTX of each kernel's last variant, by the kernel's name."""

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
