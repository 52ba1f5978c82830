"""The interface of a GPU: memory, copy streams, events and compiled programs.

Work goes to three places that run beside each other: the compute stream (torch's current one), `uploads`
(RAM to device) and `downloads` (device to RAM). Nothing here waits for the whole device but `synchronize`;
order across streams is made with events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moebox._kernels import Copier
from moebox.kernels.gpu.base import Ops

Program = Callable[[], None]


class Event(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether all work before it has ended; `DeviceError` if a copy failed."""
        ...

    def synchronize(self) -> None:
        """Wait for it on the host; `DeviceError` if a copy failed."""

    def seconds_since(self, earlier: Event) -> float:
        """Time between two events that are done, on the device's clock."""
        ...


class CopyStream(Protocol):
    """Copies between pinned RAM and the device, in order, beside everything else."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy; both tensors are of one size and contiguous, and live until it is done."""

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Queue copies of (target, source)."""

    def record(self) -> Event:
        """An event behind all that was queued so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let what is queued from here on wait for `event`, of another stream."""


class Launch(Protocol):
    """A compiled program that can be run again and again."""

    def start(self) -> None:
        """Start a run and return at once."""

    def finish(self) -> None:
        """Wait for the run's end; raises what went wrong in it."""


class Device(Protocol):
    """Memory, operations and streams of one GPU.

    Attributes:
        torch_device: where `empty` puts tensors.
        ops: the operations for tensors there.
        uploads, downloads: the two directions of PCIe.
    """

    @property
    def torch_device(self) -> torch.device: ...
    @property
    def ops(self) -> Ops: ...
    @property
    def uploads(self) -> CopyStream: ...
    @property
    def downloads(self) -> CopyStream: ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeros in RAM that the device reads, writes and copies without a detour."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory, not initialised; `torch.OutOfMemoryError` where there is none."""
        ...

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """Pin memory that exists already, page-aligned; returns what unpins it.

        Raises:
            PlanError: the system allows no more pinned memory.
        """
        ...

    def copier(self) -> Copier:
        """What the decode step's C++ side uploads and downloads with, on this device's copy streams."""
        ...

    def compile(self, program: Program) -> Launch:
        """Make a program of device operations cheap to run: a CUDA graph.

        On CUDA the program is run once before it is captured, so that its kernels are compiled: raise the
        flags that it waits for first (`Mailbox.raise_flags`). Tensors that it makes stay with the graph.
        """
        ...

    def mark(self) -> Event:
        """An event on the compute stream, behind all that was queued so far."""
        ...

    def compute_waits(self, event: Event) -> None:
        """Let the compute stream wait for an event of a copy stream, from here on."""

    def send(self, source: Tensor) -> Tensor:
        """A copy of pinned memory on the device, queued on the compute stream."""
        ...

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy to memory that is pinned or the device's, on the compute stream; `source` likewise."""

    def free_vram_bytes(self) -> int:
        """Bytes that `empty` can still give."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has nothing left to do; raises what went wrong on it."""
