"""Does uploading ahead pay? Tokens with it and without it take turns in one process.

    python benchmarks/uploads_ahead.py --layers 9 --vram 80GB --recall 0.46,0.7,0.89

A random model of K2's shape, routed by a synthetic trace, decodes token by token. Every few tokens the decode
program that predicts takes turns with the one that does not (on, off, off, on). `--recall` sets the share of
a layer's picks that are predicted, in random order; the other predictions are experts that it does not pick.
Real routers predict the likeliest experts first, which is better.

Printed per recall: ms a token of both kinds (mean); the change, with its standard error over pairs of turns;
experts whose upload began ahead, and how many of them were used, late and wrong; the share of uploaded bytes
that was uploaded ahead; the bytes of wrong ones; the host's cost on the critical path; and at the end whether
a live trial turned uploading ahead on or off, and what the trial cost. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.commands.options import ByteSize
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.target import BenchTarget, make_pool, shape_target
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.decode.host_step import FIELDS
from moebox.offload.device.registry import open_device
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.prefetch.ab_trial import Trial
from moebox.offload.routing.trace import RoutingTrace, TraceRouting, synthetic_trace
from moebox.runtime.engine.gpu_runner import GpuRunner

TURN_TOKENS = 4
WARMUP_TOKENS = 48


@dataclass
class Turns:
    """Takes the place of a `Trial`: `compare` sets `on`."""

    on: bool = False
    trying: bool = True
    change: float | None = None
    why_off: str = ""

    def observe(self, _seconds: float, _to_read: int) -> bool:
        """Decide nothing."""
        return False


@dataclass
class Arm:
    """Tokens of one kind."""

    seconds: list[float] = field(default_factory=list)
    stats: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def mean(self, name: str) -> float:
        """Mean of a figure of `FIELDS` over layers and tokens."""
        return float(np.nanmean(np.stack(self.stats)[:, :, FIELDS.index(name)]))

    def turns(self) -> list[float]:
        """Mean seconds of a token in each turn."""
        return np.array(self.seconds).reshape(-1, TURN_TOKENS).mean(axis=1).tolist()


def predict(trace: RoutingTrace, n_experts: int, recall: float) -> Tensor:
    """Predictions with the given recall: int32 [tokens, L, k]; -1 is none."""
    generator = np.random.default_rng(11)
    out = np.empty_like(trace.ids)
    for index in np.ndindex(trace.ids.shape[:2]):
        picks = trace.ids[index]
        others = np.setdiff1d(generator.permutation(n_experts)[: 3 * len(picks)], picks)
        right = generator.random(len(picks)) < recall
        others = np.pad(generator.permutation(others), (0, len(picks)), constant_values=-1)[: len(picks)]
        out[index] = generator.permutation(np.where(right, picks, others))
    return torch.from_numpy(out)


class Decoding:
    """Decodes the target's tokens, one after the other, with predictions of the trace."""

    def __init__(self, target: BenchTarget, routing: TraceRouting) -> None:
        assert isinstance(target.runner, GpuRunner)
        self.runner, self.routing = target.runner, routing
        self.experts: GpuExperts = target.runner.experts
        self.cache = target.runner.new_cache(min(target.context, 2 * WARMUP_TOKENS))
        self.runner.forward([1, 2, 3, 4], self.cache, last_only=True)

    def begin(self, predictions: Tensor) -> None:
        """Start again at the beginning of the trace."""
        self.routing.rewind()
        self.experts.predictions = lambda: predictions[(self.routing.position - 1) % len(predictions)]

    def token(self) -> float:
        """Decode one token; returns its seconds."""
        if len(self.cache) + 1 >= 2 * WARMUP_TOKENS:
            self.cache.truncate(4)
        begun_s = time.perf_counter()
        self.runner.forward([5], self.cache)
        return time.perf_counter() - begun_s


def compare(decoding: Decoding, turns: int) -> dict[str, Any]:
    """Decode with and without uploading ahead in turns."""
    experts, trial = decoding.experts, Turns()
    experts.upload_ahead(trial)
    if experts.ahead is None:
        raise SystemExit("all experts lie on the GPU: give less --vram")
    for token in range(WARMUP_TOKENS):
        trial.on = token % 2 == 1
        decoding.token()
    arms, before = {False: Arm(), True: Arm()}, experts.decode_host.ahead_counts
    for turn in range(2 * turns):
        trial.on = bool((turn ^ turn >> 1) & 1)
        for _ in range(TURN_TOKENS):
            arm = arms[trial.on]
            arm.seconds.append(decoding.token())
            experts.synchronize()
            arm.stats.append(experts.decode_host.stats)
    return figures(arms, experts.decode_host.ahead_counts - before)


def figures(arms: dict[bool, Arm], counted: npt.NDArray[np.int64]) -> dict[str, Any]:
    """The figures that the module's docstring lists."""
    off, on = arms[False], arms[True]
    changes = [with_s / without_s - 1 for with_s, without_s in zip(on.turns(), off.turns(), strict=True)]
    issued, used, late, wrong, wasted, found, picked = counted.tolist()
    layers = len(on.seconds) * len(on.stats[0])
    return {
        "without_ms": 1e3 * statistics.mean(off.seconds),
        "with_ms": 1e3 * statistics.mean(on.seconds),
        "change": statistics.mean(changes),
        "error": statistics.stdev(changes) / len(changes) ** 0.5,
        "recall": found / picked if picked else None,
        "a_layer": {
            "issued": issued / layers, "used": used / layers, "late": late / layers, "wrong": wrong / layers,
        },
        "wasted_gb": wasted / 1e9,
        "with": {name: on.mean(name) for name in FIELDS},
        "without": {name: off.mean(name) for name in FIELDS},
    }  # fmt: skip


def live(decoding: Decoding, tokens: int) -> dict[str, Any]:
    """Decode with a live trial: what it finds, and the mean time of a token."""
    trial = Trial()
    decoding.experts.upload_ahead(trial)
    seconds = [decoding.token() for _ in range(tokens)]
    return {
        "on": trial.on or trial.trying,
        "trying": trial.trying,
        "change": trial.change,
        "ms": 1e3 * statistics.mean(seconds),
    }


def show(result: dict[str, Any]) -> None:
    """Print the result for people."""
    rate, with_, without = result["a_layer"], result["with"], result["without"]
    print(
        f"recall {result['recall'] or 0:.2f}: {result['without_ms']:.3f} ms without, "
        f"{result['with_ms']:.3f} with, {result['change']:+.2%} (standard error {result['error']:.2%}); "
        f"live trial: {result['live']}"
    )
    print(
        f"  a layer: {rate['issued']:.2f} begun, {rate['used']:.2f} used, {rate['late']:.2f} late, "
        f"{rate['wrong']:.2f} wrong; {with_['early']:.3f} experts early of {with_['uploads']:.2f} uploads, "
        f"{with_['wasted']:.3f} for nothing"
    )
    for name, figure in (("with", with_), ("without", without)):
        print(
            f"  {name:8} hits {figure['hits']:.2f} uploads {figure['uploads']:.2f} part {figure['part']:.2f} "
            f"cpu {figure['cpu']:.2f}; us: wait {1e6 * figure['wait_s']:.0f} "
            f"listed {1e6 * figure['listed_s']:.1f} "
            f"schedule {1e6 * figure['schedule_s']:.1f} cpu {1e6 * figure['cpu_s']:.0f} "
            f"upload {1e6 * figure['upload_s']:.0f} layer {1e6 * figure['layer_s']:.0f}"
        )


def size(text: str) -> int:
    """Bytes of `80GB`."""
    return ByteSize().convert(text, None, None)


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="kimi-k2", choices=("kimi-k2", "tiny"))
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--vram", type=size, default=None)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--turns", type=int, default=40, help="of each kind, of 4 tokens")
    parser.add_argument("--recall", default="0.46,0.7,0.89")
    parser.add_argument("--piece", type=size, default=1 << 20, help="bytes of a piece")
    return parser.parse_args()


def main() -> None:
    """Fill the tiers once, and compare for each recall."""
    options = parse()
    device = open_device(options.device)
    config = shape_config(options.shape, options.layers)
    tokens = WARMUP_TOKENS + 2 * options.turns * TURN_TOKENS
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    trace = synthetic_trace(tokens, len(config.moe_layers), experts, top_k, 0)
    bench = BenchOptions(
        shape=options.shape, layers=options.layers, vram=options.vram, threads=options.threads,
        prefetch=False, context=4 * WARMUP_TOKENS,
    )  # fmt: skip
    routing, results = TraceRouting(trace), []
    configs = (config, shape_config(options.shape))
    target = shape_target(configs, bench, device, make_pool(bench, device), routing, None)
    with torch.inference_mode():
        decoding = Decoding(target, routing)
        decoding.experts.decode_host.piece_bytes = options.piece
        for recall in map(float, options.recall.split(",")):
            decoding.begin(predict(trace, experts, recall))
            result = compare(decoding, options.turns)
            decoding.begin(predict(trace, experts, recall))
            results.append(result | {"live": live(decoding, tokens)})
            show(results[-1])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
