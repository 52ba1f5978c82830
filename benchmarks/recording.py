"""What it costs to record the router's picks, compared with the time of a token.

    python benchmarks/recording.py out/tiny-k2 --tokens 300

First the recorder alone: CPU time per decoded token and per token of a prompt, for tiny-k2's and K2's shapes,
with statistics that are loaded. `layer` is called on a box without a GPU, `token` on one with a GPU. Saving
and loading of statistics is timed, too. Then the recorder inside a loaded model's decoding, with statistics
and a trace: its share of the time of all tokens; bar: under 1 %. On a machine with other work, CPU time says
more than wall time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import moebox
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.recorder import RoutingRecorder, TraceSink
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import synthetic_trace

SHAPES = {"tiny-k2": (7, 64, 6), "kimi-k2": (60, 384, 8)}
TOKENS, PROMPT_TOKENS, ROUNDS = 256, 1024, 5


def cpu_us(call: Callable[[], object], count: int) -> float:
    """CPU time of a call, divided by `count`, in microseconds: the median of `ROUNDS`."""
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times) / count * 1e6


def alone(name: str, folder: Path) -> dict[str, float]:
    """The recorder's cost alone, with statistics of this shape."""
    layers, n_experts, top_k = SHAPES[name]
    known = RouterStatistics.open(ModelIdentity(name, name, layers, n_experts, top_k), folder / name)
    recorder = RoutingRecorder(layers, n_experts, top_k, [known])
    ids = synthetic_trace(TOKENS, layers, n_experts, top_k).ids
    routed = [[token[None, moe].astype(np.int64) for moe in range(layers)] for token in ids]
    prompt = np.tile(ids, (PROMPT_TOKENS // TOKENS, 1, 1)).astype(np.int64)

    def by_layer() -> None:
        for token in routed:
            for moe, picks in enumerate(token):
                recorder.layer(moe, picks)

    def by_token() -> None:
        for token in ids:
            recorder.token(token)

    def by_prompt() -> None:
        for moe in range(layers):
            recorder.layer(moe, prompt[:, moe])

    by_layer()
    figures = {
        "layer_us_per_token": cpu_us(by_layer, TOKENS),
        "token_us_per_token": cpu_us(by_token, TOKENS),
        "prompt_us_per_token": cpu_us(by_prompt, PROMPT_TOKENS),
    }
    start = time.perf_counter()
    known.save()
    saved = time.perf_counter()
    RouterStatistics.open(known.identity, folder / name)
    return figures | {
        "save_s": saved - start,
        "load_s": time.perf_counter() - saved,
        "file_mb": known.path.stat().st_size / 1e6,
    }


class Timed:
    """A recorder whose calls are timed; the time of reading the clocks is subtracted."""

    def __init__(self, recorder: RoutingRecorder) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._recorder = recorder

    def layer(self, moe: int, ids: np.ndarray) -> None:
        """Record a layer, and add to the time."""
        first, cpu_first = time.perf_counter(), time.thread_time()
        second, cpu_second = time.perf_counter(), time.thread_time()
        self._recorder.layer(moe, ids)
        self.wall_s += time.perf_counter() - second - (second - first)
        self.cpu_s += time.thread_time() - cpu_second - (cpu_second - cpu_first)


def inside(model: Path, tokens: int, folder: Path) -> dict[str, float]:
    """The recorder's share of the time in which a model decodes on the CPU."""
    with moebox.load(model, device="cpu", statistics=False) as loaded:
        identity = ModelIdentity.of(model)
        sinks = [
            RouterStatistics.open(identity, folder / "model"),
            TraceSink(folder / "trace.npz", identity.n_experts),
        ]
        recorder = Timed(RoutingRecorder(*identity.shape, sinks))
        loaded.engine.runner.model.model.layers[-1].mlp.experts.recorder = recorder
        session = loaded.engine.session()
        session.prefill(list(range(16)))
        for token in range(20):
            session.decode(token)
        recorder.wall_s = recorder.cpu_s = 0.0
        start = time.perf_counter()
        for token in range(tokens):
            session.decode(100 + token)
        total = time.perf_counter() - start
    return {
        "tokens": tokens,
        "ms_per_token": total / tokens * 1e3,
        "recording_us_per_token": recorder.wall_s / tokens * 1e6,
        "recording_share": recorder.wall_s / total,
        "recording_cpu_us_per_token": recorder.cpu_s / tokens * 1e6,
        "recording_cpu_share": recorder.cpu_s / total,
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="a quantized checkpoint; without: by itself only")
    parser.add_argument("--tokens", type=int, default=300, help="tokens to decode with it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report: dict[str, object] = {shape: alone(shape, folder) for shape in SHAPES}
        for shape in SHAPES:
            print(shape, ", ".join(f"{key} {value:.3g}" for key, value in report[shape].items()))
        if options.model is not None:
            report["model"] = inside(options.model, options.tokens, folder)
            print("model", ", ".join(f"{key} {value:.4g}" for key, value in report["model"].items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
