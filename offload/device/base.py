"""The interface of a GPU: memory, copy streams, events and compiled programs.

A device has three streams that run at the same time: the compute stream (torch's current one), `uploads` (RAM
to device) and `downloads` (device to RAM). Work on one stream is done in order; events order work on
different streams. Only `Device.synchronize` waits for the whole device.
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
        """Whether all work before the event has ended; `DeviceError` if a copy failed."""
        ...

    def synchronize(self) -> None:
        """Let the host wait for the event; `DeviceError` if a copy failed."""

    def seconds_since(self, earlier: Event) -> float:
        """Time between two events of one device that are done, on the device's clock."""
        ...


class CopyStream(Protocol):
    """Copies between pinned RAM and the device, in order, while other streams work."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy. Both tensors are contiguous, of one size, and live until the copy is done."""

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Queue copies of (target, source)."""

    def record(self) -> Event:
        """An event behind everything that was queued so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let everything queued from now on wait for `event`, which is of another stream."""


class Launch(Protocol):
    """A compiled program, which can be run many times."""

    def start(self) -> None:
        """Start a run and return at once."""

    def finish(self) -> None:
        """Wait for the end of the run, and raise the error that it ended with, if any."""


class Device(Protocol):
    """Memory, operations and streams of one GPU.

    Attributes:
        torch_device: where `empty` puts tensors.
        ops: the operations for tensors there.
        uploads, downloads: streams of copies, one for each direction of PCIe.
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
        """Zeros in pinned RAM, which the device can read and write itself."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory that is not initialised; `torch.OutOfMemoryError` if too little is free."""
        ...

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """Pin memory that exists already and is page-aligned. Returns a function that unpins it.

        Raises:
            PlanError: the system allows no more pinned memory.
        """
        ...

    def copier(self) -> Copier:
        """A copier for C++, which uses this device's copy streams."""
        ...

    def compile(self, program: Program) -> Launch:
        """Make a program of device operations cheap to run: a CUDA graph.

        On CUDA the program runs once before the capture, so that its kernels are compiled. Flags that it
        waits for must be raised before (`Mailbox.raise_flags`). Tensors that it makes belong to the graph.
        """
        ...

    def mark(self) -> Event:
        """An event on the compute stream, behind everything that was queued so far."""
        ...

    def compute_waits(self, event: Event) -> None:
        """Let everything queued on the compute stream from now on wait for an event of a copy stream."""

    def send(self, source: Tensor) -> Tensor:
        """A copy of pinned memory on the device, queued on the compute stream."""
        ...

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the compute stream. Both tensors are pinned or on the device."""

    def free_vram_bytes(self) -> int:
        """Bytes that `empty` can still give."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has no work left, and raise the error that occurred on it, if any."""
