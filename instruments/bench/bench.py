"""`moebox bench`: ceilings of the box, then prompts, then decoding, each beside its floor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moebox.config import ModelConfig, load_config
from moebox.cost.accounts import open_meter
from moebox.cost.energy.meter import EnergyMeter
from moebox.cost.prices.box_prices import Prices, load_prices
from moebox.errors import RequestError
from moebox.instruments.bench.cost import Spent
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.report import (
    BenchReport,
    DecodeReport,
    LayerWork,
    PrefillReport,
    decode_report,
    prefill_report,
)
from moebox.instruments.bench.rigs import Rig, checkpoint_rig, make_pool, shape_rig
from moebox.instruments.measure.ceilings import measure_ceilings
from moebox.instruments.measure.random_model import shape_config
from moebox.offload.device.base import Device
from moebox.offload.device.registry import open_device
from moebox.offload.experts import Progress
from moebox.offload.machine.floor import Ceilings
from moebox.offload.machine.hardware import cpu_name
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.routing.trace import RoutingTrace, TraceRouting, synthetic_trace
from moebox.runtime.model.kv_cache import KVCache
from moebox.version import __version__

log = logging.getLogger("moebox")

PROMPT_RUNS = 3
PROMPT_BUDGET_S = 10.0
"""No further run of a prompt starts after so many seconds of it."""
WARMUP_TOKENS = 64
"""Decoded before the measured tokens where not all experts are where they are computed: four half-lives of
an expert's score fill the cache."""
CPU_WARMUP_TOKENS = 2
SEED = 0


def bench(
    options: BenchOptions, progress: Progress | None = None, filled: RamSlab | None = None
) -> BenchReport:
    """Measure a checkpoint or a random model.

    Args:
        options: what and how.
        progress: called with (stage, bytes done, bytes in all) while loading.
        filled: all random experts of a shape on a GPU, in RAM already; see `shape_rig`.

    Raises:
        MoeboxError: as `Engine.load`; a trace that does not fit; a context that is too small; the file of
            prices has a mistake.
    """
    prices = load_prices()
    config, full = _configs(options)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = None if name == "cpu" else open_device(name)
    trace = _trace(options, config, device)
    routing = None if trace is None else TraceRouting(trace)
    pool = make_pool(options, device)
    ceilings = measure_ceilings(config, pool, device)
    if options.model is not None:
        rig = checkpoint_rig(options.model, options, name, routing, progress)
    else:
        rig = shape_rig((config, full), options, device, pool, routing, progress, filled)
    ceilings = replace(ceilings, nvme_gbps=rig.nvme_gbps)
    meter = open_meter(None if device is None else device.torch_device, prices)
    run = _Run(rig, options, ceilings, device, meter, prices)
    with closing(meter), torch.inference_mode():
        prefill, decode = run.prompts(), run.decode()
    return BenchReport(
        subject=rig.subject,
        machine=_machine(device, pool.threads),
        plan=rig.plan,
        residents=rig.residents,
        routing=_routing(trace),
        ceilings=ceilings,
        prefill=prefill,
        decode=decode,
        notes=run.notes,
        prefetch=rig.watch.prefetch(),
    )


def _configs(options: BenchOptions) -> tuple[ModelConfig, ModelConfig]:
    """At the depth that runs, and at the depth that it stands for."""
    if options.model is not None:
        if options.shape is not None or options.layers is not None:
            raise RequestError(
                "MODEL together with --shape or --layers",
                "A checkpoint is measured as it is: give one of them.",
            )
        config = load_config(options.model)
        return config, config
    if options.shape is None:
        raise RequestError("nothing to measure", "Give a checkpoint's folder, or --shape kimi-k2.")
    return shape_config(options.shape, options.layers), shape_config(options.shape)


def _trace(options: BenchOptions, config: ModelConfig, device: Device | None) -> RoutingTrace | None:
    """None: the router's own picks. By default a checkpoint routes itself, and random weights do not."""
    kind = options.routing or ("model" if options.model is not None else "synthetic")
    if kind == "model":
        return None
    layers, experts, top_k = len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok
    tokens = max(options.prompt_tokens, default=0) + options.decode_tokens + _warmup_tokens(options, device)
    if kind == "synthetic":
        return synthetic_trace(tokens, layers, experts, top_k, SEED)
    trace = RoutingTrace.load(Path(kind))
    trace.check(layers, experts, top_k, tokens)
    return trace


def _warmup_tokens(options: BenchOptions, device: Device | None) -> int:
    return CPU_WARMUP_TOKENS if device is None and options.ram is None else WARMUP_TOKENS


class _Run:
    """The passes through one rig, and what they took."""

    def __init__(
        self,
        rig: Rig,
        options: BenchOptions,
        ceilings: Ceilings,
        device: Device | None,
        meter: EnergyMeter,
        prices: Prices,
    ) -> None:
        self.rig, self.options, self.ceilings, self.device = rig, options, ceilings, device
        self.meter, self.prices = meter, prices
        self.routing = rig.watch.routing
        self.warmup = _warmup_tokens(options, device)
        longest = max(options.prompt_tokens, default=0)
        self.needed = longest + (self.warmup + options.decode_tokens if options.decode_tokens else 0)
        if self.needed > rig.context:
            raise RequestError(
                f"prompts and decoding take {self.needed} tokens; model and memory allow {rig.context}",
                "Ask for fewer tokens, or for a larger --context.",
            )
        self.cache: KVCache = rig.runner.new_cache(self.needed)
        self.ids = _prompt_ids(options, rig.subject.config, self.needed)
        self.notes: list[str] = []
        if rig.subject.moe_layers == 1:
            self.notes.append("one MoE layer: launch and dense layers are part of its time")

    def prompts(self) -> list[PrefillReport]:
        """Each prompt length in turn; the cache holds the last one in the end."""
        return [self._prompt(tokens) for tokens in self.options.prompt_tokens]

    def _prompt(self, tokens: int) -> PrefillReport:
        if self.device is not None:
            self._prompt_once(tokens, 0)  # kernels are compiled, memory is taken
        runs: list[tuple[float, list[LayerWork]]] = []
        span = self.meter.begin()
        while len(runs) < PROMPT_RUNS and sum(seconds for seconds, _ in runs) < PROMPT_BUDGET_S:
            runs.append(self._prompt_once(tokens, len(runs) + 1))
        energy = span.end()
        median = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        log.info("prompt of %d tokens: %.3f s", tokens, median[0])
        return prefill_report(
            tokens,
            [seconds for seconds, _ in runs],
            median[1],
            self.rig.subject,
            self.ceilings,
            Spent(tokens * len(runs), sum(seconds for seconds, _ in runs), energy, self.prices),
        )

    def _prompt_once(self, tokens: int, run: int) -> tuple[float, list[LayerWork]]:
        """Seconds until the last token's logits are there; each run routes another part of the trace."""
        self.cache.truncate(0)
        if self.routing is not None:
            self.routing.rewind(run * tokens % self.routing.trace.tokens)
        runner, watch = self.rig.runner, self.rig.watch
        watch.begin()
        began_s = time.perf_counter()
        for first in range(0, tokens, runner.chunk_tokens):
            chunk = self.ids[first : min(first + runner.chunk_tokens, tokens)]
            runner.forward(chunk, self.cache, last_only=True)
        seconds = time.perf_counter() - began_s
        return seconds, watch.prefill_layers(self.ceilings)

    def decode(self) -> DecodeReport | None:
        """Tokens one by one behind what the cache holds."""
        count = self.options.decode_tokens
        if not count:
            return None
        if self.routing is not None:
            self.routing.rewind(max(self.options.prompt_tokens, default=0))
        tokens = self._next_tokens()
        for _ in range(self.warmup):
            next(tokens)
        cached = len(self.cache)
        span = self.meter.begin()
        measured = [next(tokens) for _ in range(count)]
        energy, token_s = span.end(), [seconds for seconds, _ in measured]
        return decode_report(
            np.stack([layers for _, layers in measured]),
            token_s,
            self.rig.subject,
            self.ceilings,
            cached_tokens=cached,
            spent=Spent(count, sum(token_s), energy, self.prices),
        )

    def _next_tokens(self) -> Iterator[tuple[float, Any]]:
        """Seconds and layers of each token. A checkpoint goes on with its likeliest token, weights that are
        random with any."""
        runner, watch = self.rig.runner, self.rig.watch
        token = self.ids[len(self.cache)]
        while True:
            watch.begin()
            began_s = time.perf_counter()
            logits = runner.forward([token], self.cache)
            seconds = time.perf_counter() - began_s
            yield seconds, watch.decode_layers()
            greedy = self.options.model is not None or len(self.cache) >= len(self.ids)
            token = int(logits[0].argmax()) if greedy else self.ids[len(self.cache)]


def _prompt_ids(options: BenchOptions, config: ModelConfig, count: int) -> list[int]:
    """Text for a checkpoint: this package's own source, again and again; any ids for random weights."""
    if options.model is None:
        ids: list[int] = np.random.default_rng(SEED).integers(0, config.vocab_size, count).tolist()
        return ids
    from moebox.runtime.text.tokenizer import Tokenizer  # random weights need none

    text = "\n".join(path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("*.py")))
    ids = Tokenizer.load(options.model, config.vocab_size).encode(text)
    return (ids * (count // len(ids) + 1))[:count]


def _routing(trace: RoutingTrace | None) -> dict[str, Any]:
    if trace is None:
        return {"source": "the model's router"}
    return {"source": trace.source, "tokens": trace.tokens, "repeat_share": trace.repeat_share()}


def _machine(device: Device | None, threads: int) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "cpu": cpu_name(),
        "threads": threads,
        "moebox": __version__,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if device is not None:
        on_cuda = device.torch_device.type == "cuda"
        machine["gpu"] = torch.cuda.get_device_name(device.torch_device) if on_cuda else "stand-in"
    return machine
