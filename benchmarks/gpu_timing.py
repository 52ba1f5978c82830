"""Timing of GPU calls by the device's clock: what the benchmarks of the GPU kernels share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch


def graph_ms(calls: Sequence[Callable[[], object]], replays: int = 5, repeats: int = 9) -> float:
    """Median milliseconds of one of the calls, all of them in one CUDA graph that is replayed in a row."""
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
    """Median milliseconds of a long call. In a graph, a copy is a node of its own kind, and a slow one."""
    return statistics.median([_elapsed_ms(call, 1) for _ in range(repeats + 2)][2:])


def _elapsed_ms(call: Callable[[], object], times: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times
