"""`moebox bench`: measures the ceilings of the box, then prompts, then decoding, each beside its floor."""

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
from moebox.instruments.bench.cost import RunCost
from moebox.instruments.bench.decode_report import DecodeReport, decode_report
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.prefill_report import LayerWork, PrefillReport, prefill_report
from moebox.instruments.bench.prompt import SEED, random_ids, text_ids
from moebox.instruments.bench.report import BenchReport
from moebox.instruments.bench.roads import Samples
from moebox.instruments.bench.target import (
    BenchTarget,
    checkpoint_target,
    make_pool,
    shape_target,
)
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
"""No further run of a prompt starts when its runs have taken this long together."""
WARMUP_TOKENS = 64
"""Tokens decoded before the measured ones where an expert may have to be moved: four half-lives of an
expert's score, after which the cache is full."""
CPU_WARMUP_TOKENS = 2
"""The same where all experts are in RAM and the CPU computes them."""


def bench(
    options: BenchOptions, progress: Progress | None = None, filled: RamSlab | None = None
) -> BenchReport:
    """Measure a checkpoint or a random model: the box's ceilings, then prompts, then decoding.

    Args:
        options: the model, its budgets, and what to measure.
        progress: called with (stage, bytes done, bytes in all) while the model is loaded.
        filled: rows that hold all random experts of a shape already, see `shape_target`.

    Raises:
        MoeboxError: as `Engine.load`; or the trace does not fit the model, the context is too small, or the
            file of prices has a mistake.
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
        target = checkpoint_target(options.model, options, name, routing, progress)
    else:
        target = shape_target((config, full), options, device, pool, routing, progress, filled)
    ceilings = replace(ceilings, nvme_gbps=target.nvme_gbps)
    meter = open_meter(None if device is None else device.torch_device, prices)
    run = _Run(target, options, ceilings, device, meter, prices)
    with closing(meter), torch.inference_mode():
        prefill, decode = run.prompts(), run.decode()
    return BenchReport(
        model=target.model,
        machine=_machine(device, pool.threads),
        plan=target.plan,
        residents=target.residents,
        routing=_routing(trace),
        ceilings=ceilings,
        prefill=prefill,
        decode=decode,
        notes=run.notes,
        prefetch=target.experts.prefetch(),
    )


def _configs(options: BenchOptions) -> tuple[ModelConfig, ModelConfig]:
    """Configs of the model that runs and of the whole model, which is deeper if the run is shallow."""
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
    """The trace that routes the run, long enough for it; None: the model's router picks.

    Without `options.routing` the router of a checkpoint picks; random weights are routed by a synthetic
    trace.
    """
    kind = options.routing or ("model" if options.model is not None else "synthetic")
    if kind == "model":
        return None
    tokens = max(options.prompt_tokens, default=0) + options.decode_tokens + _warmup_tokens(options, device)
    if kind == "synthetic":
        return synthetic_trace(tokens, *config.routing_shape, SEED)
    trace = RoutingTrace.load(Path(kind))
    trace.check(*config.routing_shape, tokens)
    return trace


def _warmup_tokens(options: BenchOptions, device: Device | None) -> int:
    return CPU_WARMUP_TOKENS if device is None and options.ram is None else WARMUP_TOKENS


class _Run:
    """The passes through one target, and what they took."""

    def __init__(
        self,
        target: BenchTarget,
        options: BenchOptions,
        ceilings: Ceilings,
        device: Device | None,
        meter: EnergyMeter,
        prices: Prices,
    ) -> None:
        self.target, self.options, self.ceilings, self.device = target, options, ceilings, device
        self.meter, self.prices = meter, prices
        self.routing = target.experts.routing
        self.warmup = _warmup_tokens(options, device)
        longest = max(options.prompt_tokens, default=0)
        needed = longest + (self.warmup + options.decode_tokens if options.decode_tokens else 0)
        if needed > target.context:
            raise RequestError(
                f"prompts and decoding take {needed} tokens; model and memory allow {target.context}",
                "Ask for fewer tokens, or for a larger --context.",
            )
        self.cache: KVCache = target.runner.new_cache(needed)
        self.ids = _prompt_ids(options, target.model.config, needed)
        self.notes: list[str] = []
        if target.model.moe_layers == 1:
            self.notes.append("one MoE layer: launch and dense layers are part of its time")

    def prompts(self) -> list[PrefillReport]:
        """Measure each prompt length in turn; afterwards the cache holds the last prompt."""
        return [self._prompt(tokens) for tokens in self.options.prompt_tokens]

    def _prompt(self, tokens: int) -> PrefillReport:
        if self.device is not None:
            self._prompt_once(tokens, 0)  # compiles kernels and takes memory
        runs: list[tuple[float, list[LayerWork]]] = []
        span = self.meter.begin()
        while len(runs) < PROMPT_RUNS and sum(seconds for seconds, _ in runs) < PROMPT_BUDGET_S:
            runs.append(self._prompt_once(tokens, len(runs) + 1))
        energy = span.end()
        seconds = [seconds for seconds, _ in runs]
        median_s, layers = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
        log.info("prompt of %d tokens: %.3f s", tokens, median_s)
        spent = RunCost(tokens * len(runs), sum(seconds), energy, self.prices)
        return prefill_report(tokens, seconds, layers, self.target.model, self.ceilings, spent)

    def _prompt_once(self, tokens: int, run: int) -> tuple[float, list[LayerWork]]:
        """Seconds until the last token's logits, and the layers; each run uses another part of the trace."""
        self.cache.truncate(0)
        if self.routing is not None:
            self.routing.rewind(run * tokens % self.routing.trace.tokens)
        runner, experts = self.target.runner, self.target.experts
        experts.begin()
        began_s = time.perf_counter()
        for first in range(0, tokens, runner.chunk_tokens):
            chunk = self.ids[first : min(first + runner.chunk_tokens, tokens)]
            runner.forward(chunk, self.cache, last_only=True)
        seconds = time.perf_counter() - began_s
        return seconds, experts.prefill_layers(self.ceilings)

    def decode(self) -> DecodeReport | None:
        """Decode the measured tokens one by one, after a warm-up, behind what the cache holds."""
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
            self.target.model,
            self.ceilings,
            cached_tokens=cached,
            spent=RunCost(count, sum(token_s), energy, self.prices),
        )

    def _next_tokens(self) -> Iterator[tuple[float, Samples]]:
        """Decode token after token, and yield its seconds and layers.

        A checkpoint goes on with its likeliest token, random weights with the next of the random ids.
        """
        runner, experts = self.target.runner, self.target.experts
        token = self.ids[len(self.cache)]
        while True:
            experts.begin()
            began_s = time.perf_counter()
            logits = runner.forward([token], self.cache)
            seconds = time.perf_counter() - began_s
            yield seconds, experts.decode_layers()
            greedy = self.options.model is not None or len(self.cache) >= len(self.ids)
            token = int(logits[0].argmax()) if greedy else self.ids[len(self.cache)]


def _prompt_ids(options: BenchOptions, config: ModelConfig, count: int) -> list[int]:
    if options.model is None:
        return random_ids(config.vocab_size, count)
    return text_ids(options.model, config.vocab_size, count)


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
