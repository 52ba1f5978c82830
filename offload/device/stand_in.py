"""A device made of CPU memory, for tests. It computes at once; threads copy, after random delays.

The code that schedules work is the same as for a GPU, so tests find its races here, too.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moebox._kernels import HostCopier
from moebox.errors import DeviceError
from moebox.kernels.gpu.ops import load_ops
from moebox.offload.device.base import Event, Launch, Program
from moebox.offload.machine.hardware import available_ram_bytes


class StandInDevice:
    """A `Device` whose memory is the CPU's, for tests.

    Args:
        seed: of the random delays of copies.
        max_delay_us: longest delay before a copy.
        vram_bytes: memory that `empty` gives at most; None: as much as there is RAM.
    """

    def __init__(self, seed: int = 0, max_delay_us: float = 200, vram_bytes: int | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.ops = load_ops(self.torch_device)
        self.uploads = HostCopyStream(seed, max_delay_us)
        self.downloads = HostCopyStream(seed + 1, max_delay_us)
        self._seed = seed
        self._max_delay_us = max_delay_us
        self._vram_bytes = available_ram_bytes() if vram_bytes is None else vram_bytes
        self._used = [0]

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Fill the memory with 0x7f bytes, so that tests notice a read of memory that was never written."""
        nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
        if nbytes > self.free_vram_bytes():
            raise torch.OutOfMemoryError(f"{nbytes} bytes of {self.free_vram_bytes()}")
        memory = torch.full((nbytes,), 0x7F, dtype=torch.uint8)
        self._used[0] += nbytes
        weakref.finalize(memory.untyped_storage(), _give_back, self._used, nbytes)
        return memory.view(dtype).view(tuple(shape))

    def pin(self, memory: Tensor) -> Callable[[], None]:
        return lambda: None

    def copier(self) -> HostCopier:
        return HostCopier(self._seed, self._max_delay_us)

    def compile(self, program: Program) -> Launch:
        return _Thread(program)

    def mark(self) -> Event:
        return _HostEvent().happen()

    def compute_waits(self, event: Event) -> None:
        event.synchronize()

    def send(self, source: Tensor) -> Tensor:
        return source.clone()

    def fetch(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def free_vram_bytes(self) -> int:
        return self._vram_bytes - self._used[0]

    def synchronize(self) -> None:
        self.uploads.record().synchronize()
        self.downloads.record().synchronize()


def _give_back(used: list[int], nbytes: int) -> None:
    used[0] -= nbytes


class HostCopyStream:
    """A `CopyStream`: a thread that copies in order, each time after a random delay."""

    def __init__(self, seed: int, max_delay_us: float) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._failure: list[Exception] = []
        self._random = random.Random(seed)
        self._max_delay_s = max_delay_us / 1e6
        threading.Thread(
            target=_work_off, args=(self._work, self._failure), name="moebox-copy", daemon=True
        ).start()
        weakref.finalize(self, self._work.put, None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        delay_s = self._random.uniform(0, self._max_delay_s)

        def copy() -> None:
            time.sleep(delay_s)
            target.copy_(source)

        self._work.put(copy)

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            self.copy(target, source)

    def record(self) -> Event:
        event = _HostEvent(self._failure)
        self._work.put(event.happen)
        return event

    def wait(self, event: Event) -> None:
        self._work.put(event.synchronize)


@torch.inference_mode()  # else it could not write to tensors that were made in that mode
def _work_off(work: queue.SimpleQueue[Callable[[], object] | None], failure: list[Exception]) -> None:
    while (step := work.get()) is not None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # raised again where the host waits
            failure.append(error)


class _HostEvent:
    def __init__(self, failure: list[Exception] | None = None) -> None:
        self._happened = threading.Event()
        self._failure = [] if failure is None else failure
        self._time_s = 0.0

    def happen(self) -> _HostEvent:
        self._time_s = time.perf_counter()
        self._happened.set()
        return self

    def done(self) -> bool:
        if not self._happened.is_set():
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        self._happened.wait()
        if self._failure:
            raise DeviceError(f"a copy failed: {self._failure[0]}") from self._failure[0]

    def seconds_since(self, earlier: Event) -> float:
        if not isinstance(earlier, _HostEvent):
            raise TypeError(f"event: {type(earlier).__name__} given, an event of a stand-in device needed")
        return self._time_s - earlier._time_s


class _Thread:
    """Runs a program in a thread, in the caller's autograd mode."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self) -> None:
        modes: Any = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        self._failure = None
        self._thread = threading.Thread(target=self._run, args=modes, daemon=True)
        self._thread.start()

    def _run(self, inference: bool, grad: bool) -> None:
        try:
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                self._program()
        except BaseException as error:  # noqa: BLE001  # raised again by finish()
            self._failure = error

    def finish(self) -> None:
        if self._thread is None:
            raise RuntimeError("finish() before start()")
        self._thread.join()
        if self._failure is not None:
            raise self._failure
