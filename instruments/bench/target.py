"""What a benchmark runs: a checkpoint, or a random model at any depth with budgets scaled to that depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.instruments.bench.instrumented_experts import (
    InstrumentedCpuExperts,
    InstrumentedExperts,
    InstrumentedGpuExperts,
)
from moebox.instruments.bench.measured_model import MeasuredModel
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.measure.random_model import experts_in_ram, synthetic_model
from moebox.kernels import cpu
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.device.base import Device
from moebox.offload.disk.base import Store
from moebox.offload.disk.store import ExpertStore
from moebox.offload.experts import Progress
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.machine.hardware import available_ram_bytes
from moebox.offload.memory.ram_slab import RamSlab, row_stride
from moebox.offload.routing.trace import TraceRouting
from moebox.runtime.engine.base import Runner
from moebox.runtime.engine.cpu_plan import describe
from moebox.runtime.engine.cpu_runner import CpuRunner
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.gpu_plan import GpuPlan, describe_fixed, plan_gpu_memory
from moebox.runtime.engine.gpu_runner import CORES_FOR_UPLOADS, CacheMemory, GpuRunner
from moebox.runtime.engine.plan_parts import ram_room_bytes
from moebox.runtime.model.compute import GpuProcessor
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.mlp import MoE
from moebox.units import ceil_div, gib

MAKE_CHECKPOINT = "`moebox synth DST --format int4`, then `moebox bench DST`"


@dataclass(frozen=True)
class BenchTarget:
    """A loaded model, ready to be measured.

    Attributes:
        model: its name, config and depth.
        runner: computes prompts and tokens.
        experts: between the model and its experts; they time each layer.
        context: tokens that a cache may hold.
        plan: lines that say how the budgets became slots and rows.
        residents: experts on the GPU, of how many: "slots" of "of" in the run, "full_slots" of "full_of" at
            full depth; "rows": experts in RAM.
        nvme_gbps: measured bandwidth of the drives where experts stay on disk; 0 where none do, or where it
            could not be measured.
    """

    model: MeasuredModel
    runner: Runner
    experts: InstrumentedExperts
    context: int
    plan: list[str]
    residents: dict[str, int]
    nvme_gbps: float = 0.0


def make_pool(options: BenchOptions, device: Device | None) -> cpu.ThreadPool:
    """`options.threads` threads; by default one for each core, less `CORES_FOR_UPLOADS` with a GPU."""
    if options.threads or device is None:
        return cpu.ThreadPool(options.threads)
    return cpu.ThreadPool(max(1, cpu.allowed_cpus() - CORES_FOR_UPLOADS))


def checkpoint_target(
    path: Path,
    options: BenchOptions,
    device: str,
    routing: TraceRouting | None,
    progress: Progress | None,
) -> BenchTarget:
    """Load a checkpoint as `moebox run` does.

    Raises:
        MoeboxError: as `Engine.load`.
    """
    loading = options.load_options(device=device, progress=progress, statistics=False)
    engine = Engine.load(path, loading)
    runner, config, plan = engine.runner, engine.config, engine.plan
    experts: InstrumentedExperts
    store: Store | None
    if isinstance(plan, GpuPlan):
        assert isinstance(runner, GpuRunner)
        experts = InstrumentedGpuExperts(runner.experts, config, routing)
        lines = [f"GPU: {describe_fixed(plan)}; {plan.slots:,} slots for {config.n_keys:,} experts"]
        slots, rows = runner.experts.gpu.n_slots, plan.ram_rows
        store = None if runner.experts.cold is None else runner.experts.cold.store
    else:
        cpu_experts = _experts_of(runner.model)
        experts = InstrumentedCpuExperts(cpu_experts, config, routing)
        lines, slots, rows = [f"RAM: {describe(plan)}"], 0, plan.rows
        store = None if plan.experts_fit else cpu_experts.cache.store
    runner.model.connect(experts)
    model = MeasuredModel(path.name, config, len(config.moe_layers), engine.dtype.itemsize)
    keys = config.n_keys
    residents = {"slots": slots, "of": keys, "full_slots": slots, "full_of": keys, "rows": rows}
    return BenchTarget(model, runner, experts, engine.context, lines, residents, _nvme_gbps(store))


def _experts_of(model: KimiK2) -> CpuExperts:
    moe = next(module for module in model.modules() if isinstance(module, MoE))
    if not isinstance(moe.experts, CpuExperts):
        raise TypeError(f"the model's experts are {type(moe.experts).__name__}")
    return moe.experts


def _nvme_gbps(store: Store | None) -> float:
    """GB/s of all drives together.

    0 where the shards are too small to measure a drive, or are read through the page cache.
    """
    if not isinstance(store, ExpertStore):
        return 0.0
    return sum(speed.gbps for speed in store.measure_depth().values())


def shape_target(
    configs: tuple[ModelConfig, ModelConfig],
    options: BenchOptions,
    device: Device | None,
    pool: cpu.ThreadPool,
    routing: TraceRouting | None,
    progress: Progress | None,
    filled: RamSlab | None = None,
) -> BenchTarget:
    """Make a model of random weights.

    Args:
        configs: of the depth that runs, and of the whole model, for which the budgets are meant.
        options: what to measure.
        device: the GPU; None: the CPU computes.
        pool: computes the CPU's experts.
        routing: the trace; None: the model's router picks.
        progress: called while experts are filled.
        filled: rows that hold all random experts of the run already, for runs with several budgets.

    Raises:
        PlanError: with the numbers, when it does not fit.
    """
    config, full = configs
    name = f"{options.shape}, random, {config.num_hidden_layers} of {full.num_hidden_layers} layers"
    model = MeasuredModel(name, config, len(full.moe_layers))
    if device is None:
        return _cpu_target(model, pool, options, routing, progress)
    free_ram = available_ram_bytes() + (0 if filled is None else filled.slab.nbytes)
    budgets = scale_budgets(config, full, options, device.free_vram_bytes(), free_ram)
    if filled is not None and budgets.exclusive:
        raise PlanError("a RAM budget below all experts, but RAM holds them all", "Leave the RAM budget out.")
    backbone = synthetic_model(config, torch.bfloat16, GpuProcessor(device.torch_device, device.ops))
    memory = CacheMemory(backbone, device, budgets.context)
    ram = RamSlab(config, budgets.rows, device, progress) if filled is None else filled
    experts = GpuExperts.build(device, pool, ram, budgets.slots, budgets.exclusive)
    if filled is None:
        experts.fill_synthetic()
    if options.prefetch:
        experts.upload_ahead()
    runner = GpuRunner(backbone, device, experts, memory, budgets.chunk_tokens)
    instrumented = InstrumentedGpuExperts(experts, config, routing)
    backbone.connect(instrumented)
    residents = {
        "slots": experts.gpu.n_slots,
        "of": config.n_keys,
        "full_slots": budgets.full_slots,
        "full_of": full.n_keys,
        "rows": budgets.rows,
    }
    return BenchTarget(model, runner, instrumented, budgets.context, budgets.lines, residents)


def _cpu_target(
    model: MeasuredModel,
    pool: cpu.ThreadPool,
    options: BenchOptions,
    routing: TraceRouting | None,
    progress: Progress | None,
) -> BenchTarget:
    config = model.config
    if options.vram:
        raise PlanError(f"vram = {options.vram} bytes, but the CPU computes", "Leave the VRAM budget out.")
    keys = config.n_keys
    rows_bytes = keys * row_stride(config)
    if options.ram is not None and options.ram < rows_bytes:
        raise PlanError(
            f"RAM budget of {gib(options.ram)} for {gib(rows_bytes)} of random experts, which lie nowhere "
            "else",
            f"Measure the disk with a checkpoint: {MAKE_CHECKPOINT}.",
        )
    _check_ram(config, keys, available_ram_bytes())
    ram = RamSlab(config, progress=progress)
    ram.fill_synthetic()
    backbone = synthetic_model(config, torch.bfloat16)
    experts = InstrumentedCpuExperts(experts_in_ram(ram, pool), config, routing)
    backbone.connect(experts)
    runner = CpuRunner(backbone, pool, torch.bfloat16)
    lines = [f"RAM: experts {gib(config.experts_bytes)}; no GPU"]
    residents = {"slots": 0, "of": keys, "full_slots": 0, "full_of": keys, "rows": keys}
    context = min(options.context or config.max_position_embeddings, config.max_position_embeddings)
    return BenchTarget(model, runner, experts, context, lines, residents)


@dataclass(frozen=True)
class ScaledBudgets:
    """What a shallow run gets of the whole model's budgets.

    Attributes:
        slots, rows: experts of the run on the GPU and in RAM.
        exclusive: an expert on the GPU is not also in RAM.
        context: tokens that a cache may hold.
        chunk_tokens: tokens of a prompt that go through the model at once.
        full_slots: experts of the whole model on the GPU.
        lines: the arithmetic, for the report.
    """

    slots: int
    rows: int
    exclusive: bool
    context: int
    chunk_tokens: int
    full_slots: int
    lines: list[str]


def scale_budgets(
    config: ModelConfig, full: ModelConfig, options: BenchOptions, free_vram: int, free_ram: int
) -> ScaledBudgets:
    """Plan the whole model, then give the run the same share of its experts, rounded up.

    A budget may be more than the machine has, because the run takes only its share of it. `vram` = 0 keeps no
    expert on the GPU.

    Raises:
        PlanError: the whole model does not fit the budgets, or the run does not fit the machine.
    """
    keys, full_keys = config.n_keys, full.n_keys
    plan = plan_gpu_memory(
        full,
        vram=options.vram or None,
        free_vram=max(free_vram, options.vram or 0),
        ram=options.ram,
        free_ram=2 * full.experts_bytes if options.ram is None else options.ram,
        context=options.context,
    )
    full_slots = 0 if options.vram == 0 else plan.slots
    passing = min(full_slots, full.num_experts_per_tok)  # kept free for a layer's uploads, at any depth
    slots = passing + ceil_div((full_slots - passing) * keys, full_keys)
    rows = ceil_div(plan.ram_rows * keys, full_keys)
    _check_all_held(rows + (slots - passing if plan.exclusive else 0), keys)
    _check_ram(config, rows, free_ram)
    vram = free_vram if options.vram is None else options.vram
    lines = _plan_lines(plan, full_slots - passing, full_keys, vram)
    lines.append(
        f"this run: {len(config.moe_layers)} of {len(full.moe_layers)} MoE layers, so {slots - passing:,} of "
        f"{keys:,} experts and {passing} slots that uploads pass through; {rows:,} experts in RAM"
    )
    return ScaledBudgets(slots, rows, plan.exclusive, plan.context, plan.chunk_tokens, full_slots, lines)


def _plan_lines(plan: GpuPlan, lasting: int, keys: int, vram: int) -> list[str]:
    if vram == 0:
        return ["no expert is kept on the GPU"]
    return [
        f"whole model in {gib(vram)} of GPU memory: {describe_fixed(plan)}",
        f"the rest of it holds {lasting:,} of {keys:,} experts ({lasting / keys:.1%})",
    ]


def _check_all_held(held: int, keys: int) -> None:
    if held < keys:
        raise PlanError(
            f"the budgets hold {held:,} of {keys:,} random experts, which lie nowhere else",
            f"Give more --ram or --vram, or measure the disk with a checkpoint: {MAKE_CHECKPOINT}.",
        )


def _check_ram(config: ModelConfig, rows: int, free_ram: int) -> None:
    needed, room = rows * row_stride(config), ram_room_bytes(None, free_ram)
    if needed > room:
        raise PlanError(
            f"{rows:,} experts take {gib(needed)} of RAM, {gib(room)} are free",
            "Ask for fewer --layers.",
        )
