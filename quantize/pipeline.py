"""From source tensors to finished shards: a pool of threads, two or more shards open at a time.

The kernels release the GIL, so threads suffice. A thread holds one expert's INT4 matrices or one piece of a
backbone tensor, so that memory does not grow with the model. Source bytes are mapped, read ahead, and
dropped from memory after their use.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from moebox.errors import CheckpointError, PlanError
from moebox.offload.checkpoint.layout import expert_checksum
from moebox.offload.checkpoint.safetensors import TORCH_DTYPES, TensorInfo, map_bytes
from moebox.quantize.conversion import Conversion, Infos
from moebox.quantize.encodings import FP8_BLOCK
from moebox.quantize.int4 import QuantError
from moebox.quantize.output.journal import Journal
from moebox.quantize.output.shards import Shard
from moebox.quantize.output.writer import ShardWriter
from moebox.quantize.page_cache import drop_cache, drop_mapped, will_need
from moebox.quantize.progress import Meter
from moebox.quantize.source.formats import read_backbone, read_expert
from moebox.quantize.source.inventory import SourceTensor
from moebox.units import ceil_div

PIECE_BYTES = 32 << 20
"""Source bytes of a backbone tensor that one thread converts at a time."""

HINTED_BYTES = 64 << 10
"""Smaller tensors are neither read ahead nor dropped: the calls would cost more than they save."""


@dataclass(frozen=True)
class _Written:
    """The quantization error of a written expert, and the checksum of its bytes."""

    error: QuantError
    xxh3: str


@dataclass
class _Task:
    """Work for one thread: `run` reads `parts` and writes an expert or a piece of a backbone tensor.

    It returns None for the latter.
    """

    run: Callable[[], _Written | None]
    parts: list[TensorInfo]

    @property
    def source_bytes(self) -> int:
        return sum(info.nbytes for info in self.parts)


@dataclass
class _OpenShard:
    shard: Shard
    writer: ShardWriter
    futures: list[Future[_Written | None]]


def open_shards(workers: int) -> int:
    """Output shards that are open at once: one is hashed and synced while others are filled."""
    return 2 + workers // 8


class Pipeline:
    """Makes the shards that the journal does not name yet.

    Args:
        conversion: what to convert.
        dst: output folder.
        journal: started; gets a line for each finished shard.
        workers: threads.
        meter: counts the source bytes that are done.
        delete_source: delete a source shard once every shard that needs it is in the journal.
    """

    def __init__(
        self,
        conversion: Conversion,
        dst: Path,
        journal: Journal,
        *,
        workers: int,
        meter: Meter,
        delete_source: bool,
    ) -> None:
        self._conversion, self._dst, self._journal, self._meter = conversion, dst, journal, meter
        self._delete_source = delete_source
        self._todo = [shard for shard in conversion.shards if shard.file not in journal.shards]
        self._waiting: dict[str, set[str]] = {}
        for shard in conversion.shards:
            for file in conversion.files(shard):
                waiting = self._waiting.setdefault(file, set())
                if shard.file not in journal.shards:
                    waiting.add(shard.file)
        self._stop = threading.Event()
        self._workers = workers
        self._open_limit = open_shards(workers)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="quantize")
        self._open: deque[_OpenShard] = deque()

    def run(self) -> None:
        """Convert all that is left; on an error or interrupt, stop and delete the partial shards."""
        try:
            self._discard_unneeded()
            for position, shard in enumerate(self._todo):
                if len(self._open) >= self._open_limit:
                    self._finish_oldest()
                self._conversion.source.fetch(self._conversion.files(shard), self._meter, self._stop)
                for follower in self._todo[position + 1 : position + 2]:
                    self._conversion.source.prefetch(self._conversion.files(follower))
                self._begin(shard)
            self._finish_all()
            self._discard_unneeded(also_unused=True)
        finally:
            self._stop.set()
            self._threads.shutdown(wait=True, cancel_futures=True)
            for job in self._open:
                job.writer.abort()

    def _begin(self, shard: Shard) -> None:
        try:
            writer = ShardWriter(self._dst, shard)
        except PlanError:  # the disk is full, but open shards have their space and can be finished
            self._finish_all()
            raise
        job = _OpenShard(shard, writer, [])
        self._open.append(job)
        tasks = [*self._expert_tasks(job), *self._backbone_tasks(job)]
        if shard.experts:
            job.writer.write(shard.experts_end, [_weight_shapes(shard)])
        for position, task in enumerate(tasks):
            ahead = tasks[position + self._workers].parts if position + self._workers < len(tasks) else []
            job.futures.append(self._threads.submit(self._do, task, ahead))

    def _do(self, task: _Task, ahead: list[TensorInfo]) -> _Written | None:
        if self._stop.is_set():
            return None
        for info in _large(ahead):
            will_need(info.file, info.offset, info.nbytes)
        result = task.run()
        for info in _large(task.parts):
            drop_mapped(map_bytes(info).ctypes.data, info.nbytes)
            drop_cache(info.file, info.offset, info.nbytes)
        self._meter.add(task.source_bytes)
        return result

    def _expert_tasks(self, job: _OpenShard) -> Iterator[_Task]:
        for position, key in enumerate(job.shard.experts):
            sources = self._conversion.inventory.experts[key]
            run = self._expert_task(job.writer, sources, job.shard.expert_offset(position))
            yield _Task(run, self._conversion.parts(sources))

    def _expert_task(
        self, writer: ShardWriter, sources: Sequence[SourceTensor], offset: int
    ) -> Callable[[], _Written]:
        def run() -> _Written:
            matrices = read_expert(sources, self._conversion.infos)
            views = [_view(tensor) for matrix in matrices for tensor in (matrix.packed, matrix.scale)]
            xxh3 = expert_checksum(np.concatenate([np.asarray(view) for view in views]))
            writer.write(offset, views)
            return _Written(sum((matrix.error for matrix in matrices), QuantError(0.0, 0.0, 0.0)), xxh3)

        return run

    def _backbone_tasks(self, job: _OpenShard) -> Iterator[_Task]:
        offsets = job.shard.offsets
        for tensor in job.shard.backbone_tensors():
            whole, offset = self._conversion.inventory.backbone[tensor.name], offsets[tensor.name]
            for piece, infos in cut_rows(whole, self._conversion.infos):
                run = self._backbone_task(job.writer, (piece, infos), whole, offset)
                yield _Task(run, list(infos.values()))
                offset += tensor.nbytes * piece.shape[0] // tensor.shape[0]

    def _backbone_task(
        self, writer: ShardWriter, piece: tuple[SourceTensor, Infos], whole: SourceTensor, offset: int
    ) -> Callable[[], None]:
        def run() -> None:
            try:
                tensor = read_backbone(*piece)
            except CheckpointError:
                read_backbone(whole, self._conversion.infos)  # names the position in the whole tensor
                raise
            writer.write(offset, [_view(tensor)])

        return run

    def _finish_all(self) -> None:
        while self._open:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        job = self._open[0]
        wait(job.futures, return_when="FIRST_EXCEPTION")
        for future in job.futures:
            if future.done():
                future.result()
        results = [future.result() for future in job.futures[: len(job.shard.experts)]]
        experts = [expert for expert in results if expert is not None]
        sha256 = job.writer.finish()
        self._open.popleft()
        self._journal.add_shard(
            {
                "shard": job.shard.file,
                "size": job.shard.size,
                "sha256": sha256,
                "errors": [(expert.error.rel_rms, expert.error.max_abs) for expert in experts],
                "xxh3": [expert.xxh3 for expert in experts],
            }
        )
        for waiting in self._waiting.values():
            waiting.discard(job.shard.file)
        self._discard_unneeded()
        self._meter.finish_shard()

    def _discard_unneeded(self, *, also_unused: bool = False) -> None:
        if not self._delete_source:
            return
        for file in self._conversion.source.facts:
            finished = file in self._waiting and not self._waiting[file]
            if finished or (also_unused and file not in self._waiting):
                self._conversion.source.discard(file)


def _large(infos: list[TensorInfo]) -> list[TensorInfo]:
    return [info for info in infos if info.nbytes >= HINTED_BYTES]


def _view(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _weight_shapes(shard: Shard) -> bytes:
    """int32 [out, in] of each projection of each expert, back to back."""
    shapes = torch.tensor(list(shard.config.expert_shapes().values()), dtype=torch.int32)
    return shapes.numpy().tobytes() * len(shard.experts)


def cut_rows(source: SourceTensor, infos: Infos) -> Iterator[tuple[SourceTensor, dict[str, TensorInfo]]]:
    """Cut a backbone matrix into runs of rows of at most `PIECE_BYTES`, whole FP8 blocks each.

    Vectors and INT4 matrices are one piece. Yields each piece, and where its parts lie by their names.
    """
    weight = infos[source.parts["weight"]] if "weight" in source.parts else None
    if weight is None or len(source.shape) != 2 or weight.nbytes <= PIECE_BYTES:
        yield source, {name: infos[name] for name in source.parts.values()}
        return
    rows, columns = source.shape
    row_bytes = columns * TORCH_DTYPES[weight.dtype].itemsize
    step = max(PIECE_BYTES // row_bytes // FP8_BLOCK, 1) * FP8_BLOCK
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        parts = {weight.name: slice_rows(weight, begin, end)}
        if "weight_scale_inv" in source.parts:
            scale = infos[source.parts["weight_scale_inv"]]
            parts[scale.name] = slice_rows(scale, begin // FP8_BLOCK, ceil_div(end, FP8_BLOCK))
        yield replace(source, shape=(end - begin, columns)), parts


def slice_rows(info: TensorInfo, begin: int, end: int) -> TensorInfo:
    """Rows [begin, end) of a matrix as a tensor of its own, under the same name."""
    row_bytes = info.nbytes // info.shape[0]
    return replace(
        info,
        shape=(end - begin, *info.shape[1:]),
        offset=info.offset + begin * row_bytes,
        nbytes=(end - begin) * row_bytes,
    )
