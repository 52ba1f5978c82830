"""A GPU as the offload tiers and the runtime's GPU side see it, and a stand-in made of CPU memory.

Work goes to three places that run beside each other: the compute stream (torch's current one), `uploads`
(RAM to device) and `downloads` (device to RAM). Nothing here waits for the whole device but `synchronize`;
order across streams is made with events.

The stand-in computes at once, in the caller's thread, and copies in threads of its own that tarry for
random, seeded times: the code that schedules is the same, and its races show.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moebox.errors import DeviceError, PlanError
from moebox.kernels.gpu.ops import Ops, load_ops
from moebox.offload.machine.hardware import available_ram_bytes

if TYPE_CHECKING:
    from moebox.offload.decode.host_step import CudaCopier, HostCopier

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

    def copier(self) -> CudaCopier | HostCopier:
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


def open_device(name: str) -> Device:
    """The device called "cuda", "cuda:0" and so on, or "stand-in" (CPU memory; for tests).

    Raises:
        PlanError: there is no such device.
    """
    if name == "stand-in":
        return StandInDevice()
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise PlanError(f"device {name!r}: not a device moebox knows", "Give cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise PlanError(f"device {name!r}: torch sees {count} CUDA devices", "Use --device cpu.")
    return CudaDevice(int(number or 0))


class CudaDevice:
    """One NVIDIA GPU. See `Device`."""

    def __init__(self, index: int = 0) -> None:
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.ops = load_ops(self.torch_device)
        self.uploads = CudaCopyStream(self.torch_device)
        self.downloads = CudaCopyStream(self.torch_device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Device`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """See `Device`."""
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.data_ptr()
        error = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
        if error:
            raise PlanError(
                f"pinning {memory.nbytes} bytes of RAM: CUDA error {error}",
                "Raise the limit of locked memory (ulimit -l), or give a smaller --ram.",
            )
        return lambda: runtime.cudaHostUnregister(address)

    def copier(self) -> CudaCopier:
        """See `Device`."""
        from moebox.offload.decode.host_step import CudaCopier

        return CudaCopier(self.uploads.stream.cuda_stream, self.downloads.stream.cuda_stream)

    def compile(self, program: Program) -> Launch:
        """See `Device`."""
        stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(stream):
            program()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _no_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            program()
        return _Graph(graph, program)

    def mark(self) -> Event:
        """See `Device`."""
        return _recorded(torch.cuda.current_stream(self.torch_device))

    def compute_waits(self, event: Event) -> None:
        """See `Device`."""
        assert isinstance(event, _CudaEvent)
        torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def send(self, source: Tensor) -> Tensor:
        """See `Device`."""
        return source.to(self.torch_device, non_blocking=True)

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source, non_blocking=True)

    def free_vram_bytes(self) -> int:
        """See `Device`."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
            self.torch_device
        )
        return free + cached

    def synchronize(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize(self.torch_device)


class CudaCopyStream:
    """A CUDA stream for copies. See `CopyStream`."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See `CopyStream`."""
        self.copy_all([(target, source)])

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `CopyStream`."""
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        """See `CopyStream`."""
        return _recorded(self.stream)

    def wait(self, event: Event) -> None:
        """See `CopyStream`."""
        assert isinstance(event, _CudaEvent)
        self.stream.wait_event(event.event)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


def _recorded(stream: torch.cuda.Stream) -> _CudaEvent:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return _CudaEvent(event)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, program: Program) -> None:
        self._graph = graph
        self._program = program  # keeps alive the tensors that the graph reads
        self._end = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def start(self) -> None:
        self._graph.replay()
        self._end.record()

    def finish(self) -> None:
        self._end.synchronize()  # spins: the host has just handed over the last layer


class StandInDevice:
    """CPU memory that plays a GPU's, for tests. See `Device`.

    Args:
        seed: of the copies' delays.
        max_delay_us: longest delay before a copy.
        vram_bytes: what `empty` gives at most; None: as much as there is RAM.
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
        """See `Device`."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Device`. Filled with 0x7f bytes, so that a read of what was never written shows."""
        nbytes = int(torch.Size(shape).numel()) * dtype.itemsize
        if nbytes > self.free_vram_bytes():
            raise torch.OutOfMemoryError(f"{nbytes} bytes of {self.free_vram_bytes()}")
        memory = torch.full((nbytes,), 0x7F, dtype=torch.uint8)
        self._used[0] += nbytes
        weakref.finalize(memory.untyped_storage(), _give_back, self._used, nbytes)
        return memory.view(dtype).view(tuple(shape))

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """See `Device`."""
        return lambda: None

    def copier(self) -> HostCopier:
        """See `Device`."""
        from moebox.offload.decode.host_step import HostCopier

        return HostCopier(self._seed, self._max_delay_us)

    def compile(self, program: Program) -> Launch:
        """See `Device`."""
        return _Thread(program)

    def mark(self) -> Event:
        """See `Device`: what was computed is done."""
        return _HostEvent().happen()

    def compute_waits(self, event: Event) -> None:
        """See `Device`."""
        event.synchronize()

    def send(self, source: Tensor) -> Tensor:
        """See `Device`."""
        return source.clone()

    def fetch(self, target: Tensor, source: Tensor) -> None:
        """See `Device`."""
        target.copy_(source)

    def free_vram_bytes(self) -> int:
        """See `Device`."""
        return self._vram_bytes - self._used[0]

    def synchronize(self) -> None:
        """See `Device`."""
        self.uploads.record().synchronize()
        self.downloads.record().synchronize()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """An older graph that the garbage collector frees during a capture would break it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _give_back(used: list[int], nbytes: int) -> None:
    used[0] -= nbytes


class HostCopyStream:
    """A thread that copies in order, each time after a random delay. See `CopyStream`."""

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
        """See `CopyStream`."""
        delay_s = self._random.uniform(0, self._max_delay_s)

        def copy() -> None:
            time.sleep(delay_s)
            target.copy_(source)

        self._work.put(copy)

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """See `CopyStream`."""
        for target, source in pairs:
            self.copy(target, source)

    def record(self) -> Event:
        """See `CopyStream`."""
        event = _HostEvent(self._failure)
        self._work.put(event.happen)
        return event

    def wait(self, event: Event) -> None:
        """See `CopyStream`."""
        self._work.put(event.synchronize)


@torch.inference_mode()  # else it could not write to tensors that were made in that mode
def _work_off(work: queue.SimpleQueue[Callable[[], object] | None], failure: list[Exception]) -> None:
    while (step := work.get()) is not None:
        try:
            step()
        except Exception as error:  # noqa: BLE001  # raised again where somebody waits
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
        assert isinstance(earlier, _HostEvent)
        return self._time_s - earlier._time_s


class _Thread:
    """Runs a program in a thread, with the caller's autograd mode."""

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
        assert self._thread is not None
        self._thread.join()
        if self._failure is not None:
            raise self._failure
