"""An NVIDIA GPU through torch: memory, copy streams, events and captured graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moebox._kernels import CudaCopier
from moebox.errors import PlanError
from moebox.kernels.gpu.ops import load_ops
from moebox.offload.device.base import Event, Launch, Program


class CudaDevice:
    """A `Device`: one NVIDIA GPU."""

    def __init__(self, index: int = 0) -> None:
        torch.cuda.set_device(index)
        self.torch_device = torch.device("cuda", index)
        self.ops = load_ops(self.torch_device)
        self.uploads = CudaCopyStream(self.torch_device)
        self.downloads = CudaCopyStream(self.torch_device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def pin(self, memory: Tensor) -> Callable[[], None]:
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
        return CudaCopier(self.uploads.stream.cuda_stream, self.downloads.stream.cuda_stream)

    def compile(self, program: Program) -> Launch:
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
        return _recorded(torch.cuda.current_stream(self.torch_device))

    def compute_waits(self, event: Event) -> None:
        torch.cuda.current_stream(self.torch_device).wait_event(_cuda_event(event))

    def send(self, source: Tensor) -> Tensor:
        return source.to(self.torch_device, non_blocking=True)

    def fetch(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def free_vram_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
            self.torch_device
        )
        return free + cached

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)


class CudaCopyStream:
    """A `CopyStream`: a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.copy_all([(target, source)])

    def copy_all(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        return _recorded(self.stream)

    def wait(self, event: Event) -> None:
        self.stream.wait_event(_cuda_event(event))


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        return float(_cuda_event(earlier).elapsed_time(self.event)) / 1e3


def _cuda_event(event: Event) -> torch.cuda.Event:
    if not isinstance(event, _CudaEvent):
        raise TypeError(f"event: {type(event).__name__} given, an event of a CUDA device needed")
    return event.event


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
        self._end.synchronize()  # spins: the last layer is all that is left to compute


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing an older graph during a capture, which would break it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
