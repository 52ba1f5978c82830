"""Timing of GPU calls by the device's clock, for the benchmarks of the GPU kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = 5, repeats: int = 9) -> float:
    """Median milliseconds of a call; all calls are in one CUDA graph, which is replayed several times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = [_elapsed_ms(graph.replay, replays) for _ in range(repeats + 1)]
    return statistics.median(times[1:]) / len(calls)


def eager_ms(call: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds of a long call, outside a graph: a graph copies in another, slower way."""
    return statistics.median([_elapsed_ms(call, 1) for _ in range(repeats + 2)][2:])


def _elapsed_ms(call: Callable[[], object], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times
