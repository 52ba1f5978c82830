from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Array: TypeAlias = torch.Tensor | npt.NDArray[Any]

def isa_paths() -> list[str]: ...
def allowed_cpus() -> int: ...

class ThreadPool:
    """Threads that share out a kernel's work: `threads` with the caller, one per allowed CPU by default.

    With `pin`, each worker stays on a CPU of its own; the caller's affinity is left alone. Workers spin for
    50 microseconds after a call, then sleep. A pool may be used from several Python threads, one call at a
    time, but not in a child made by fork().
    """
    def __init__(self, threads: int | None = None, pin: bool = True) -> None: ...
    @property
    def threads(self) -> int: ...

class Expert:
    """An expert's six arrays, kept alive: gate and up [I, H], down [H, I], each packed int32 and bf16 scale.

    Raises TypeError or ValueError that names the array, what was given and what is needed.
    """
    def __init__(
        self,
        gate_packed: Array,
        gate_scale: Array,
        up_packed: Array,
        up_scale: Array,
        down_packed: Array,
        down_scale: Array,
    ) -> None: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def experts_forward(
    pool: ThreadPool,
    experts: Sequence[Expert],
    offsets: Array,
    tokens: Array,
    weights: Array,
    hidden: Array,
    out: Array,
    isa: str | None = None,
) -> None: ...
def read_bandwidth(pool: ThreadPool, arrays: Sequence[Array], isa: str | None = None) -> float:
    """GB/s at which the pool reads the arrays once, in order."""

def peak_gflops(pool: ThreadPool, isa: str | None = None) -> float:
    """GFLOP/s of multiply-adds in registers, in the unit `isa` uses for many tokens."""

def quantize_int4(
    weight: npt.NDArray[np.uint8],
    dtype: str,
    scale_inv: npt.NDArray[np.float32] | None,
    packed: npt.NDArray[np.int32],
    scale: npt.NDArray[np.uint16],
    threads: int,
    isa: str | None,
) -> tuple[int, int, float, float, float]: ...
def to_bfloat16(
    weight: npt.NDArray[np.uint8],
    dtype: str,
    scale_inv: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint16] | None,
    threads: int,
    isa: str | None,
) -> tuple[int, int]: ...
