"""The box that a plan is for: this one as it was measured, or another that is described by its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from moebox.config import ModelConfig
from moebox.errors import CheckpointError, PlanError
from moebox.instruments.doctor.checks import cpu as cpu_checks
from moebox.instruments.measure.ceilings import cpu_figures, gpu_figures
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan.gpus import (
    REFERENCE_CPU,
    REFERENCE_CPU_TFLOPS,
    REFERENCE_RAM_GBPS,
    GpuPreset,
    find_preset,
)
from moebox.instruments.plan.speed import CPU_BOX, H200_BOX, ColdReads, Efficiency
from moebox.kernels import cpu
from moebox.offload.device.base import Device
from moebox.offload.device.registry import open_device
from moebox.offload.machine.drives import drive_at
from moebox.offload.machine.floor import Ceilings
from moebox.offload.machine.hardware import available_ram_bytes, cpu_identity, cpu_name, gpu_identity
from moebox.offload.machine.profile import Kind, MachineProfile, Part
from moebox.runtime.engine.cpu_plan import least_ram_rows
from moebox.runtime.engine.plan_parts import SYSTEM_SHARE, ram_room_bytes
from moebox.units import gib

log = logging.getLogger("moebox")

ASSUMED_NVME_GBPS = 3.0
"""Of a drive that nobody has measured or named."""
ASSUMED_RAM_STEP = 64 << 30
"""Memory is sold in such steps."""


@dataclass(frozen=True)
class BoxOptions:
    """What the user says of the box; None is what this one has.

    Attributes:
        gpu: a preset's name; another box is meant then. "none": no GPU.
        vram, ram: of another box what it has, of this one what may be used; bytes. More RAM than this box has
            means another one too.
        nvme_gbps, ram_gbps: of all drives together, and of RAM, reading.
    """

    gpu: str | None = None
    vram: int | None = None
    ram: int | None = None
    nvme_gbps: float | None = None
    ram_gbps: float | None = None


@dataclass(frozen=True)
class Box:
    """What there is, and how fast it is.

    Attributes:
        name: for people.
        free_vram, free_ram: bytes that a program finds free; 0 of VRAM: no GPU.
        vram, ram: budgets within that; None: all, of RAM less the system's share.
        ceilings: what the box can do.
        efficiency: what of that is reached.
        preset: the GPU's data sheet, where it is not in this machine.
        sources: where the figures are from, in lines.
    """

    name: str
    free_vram: int
    vram: int | None
    free_ram: int
    ram: int | None
    ceilings: Ceilings
    efficiency: Efficiency
    preset: GpuPreset | None = None
    sources: tuple[str, ...] = ()

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU takes part."""
        return self.free_vram > 0

    @property
    def ram_room(self) -> int:
        """Bytes of RAM that moebox may take."""
        return ram_room_bytes(self.ram, self.free_ram)


def find_box(
    options: BoxOptions, config: ModelConfig, folders: Sequence[Path], *, measure: bool = True
) -> Box | None:
    """The box that `options` mean, for a model whose shards are in `folders`.

    What was never measured of this box is measured now, which takes some seconds, and kept in its profile;
    without `measure` the answer is None then.

    Raises:
        PlanError: no such GPU, or less memory than nothing.
    """
    for name in ("nvme_gbps", "ram_gbps", "ram"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise PlanError(f"{name} = {value}: must be above 0")
    if options.gpu is not None or (options.ram or 0) > available_ram_bytes():
        return _described(options, config)
    return _this_box(options, config, folders, measure)


def _described(options: BoxOptions, config: ModelConfig) -> Box:
    preset = None if options.gpu in (None, "none") else find_preset(str(options.gpu))
    ram_gbps = options.ram_gbps or REFERENCE_RAM_GBPS
    nvme_gbps = options.nvme_gbps or ASSUMED_NVME_GBPS
    ram = options.ram or _enough_ram(config)
    sources = [
        _given("RAM", options.ram_gbps, f"{ram_gbps:.0f} GB/s, {REFERENCE_CPU}", "--ram-gbps"),
        _given("disk", options.nvme_gbps, f"{nvme_gbps:g} GB/s", "--nvme-gbps"),
    ]
    if options.ram is None:
        sources.append(f"RAM: {gib(ram)} assumed, enough for all experts; --ram says otherwise")
    memory, name = 0, "a box without a GPU"
    ceilings = Ceilings(ram_gbps=ram_gbps, cpu_tflops=REFERENCE_CPU_TFLOPS, nvme_gbps=nvme_gbps)
    if preset is not None:
        ceilings = preset.ceilings(ram_gbps, REFERENCE_CPU_TFLOPS, nvme_gbps)
        memory, name = options.vram or preset.free_bytes, preset.title
        sources.append(
            f"GPU: {ceilings.hbm_gbps:,.0f} GB/s, PCIe {ceilings.pcie_gbps:.0f} GB/s and "
            f"{ceilings.gpu_tflops:,.0f} TFLOP/s: of its data sheet what an H200 reaches of its own"
        )
    efficiency = CPU_BOX if preset is None else H200_BOX
    sources.append(f"what is lost against bandwidths: {efficiency.source}")
    name = f"{name}, {gib(ram)} of RAM, disk {nvme_gbps:g} GB/s"
    return Box(name, memory, None, ram, None, ceilings, efficiency, preset, tuple(sources))


def with_gpu(box: Box, preset: GpuPreset) -> Box:
    """The same box with another GPU, or with one."""
    ceilings = preset.ceilings(box.ceilings.ram_gbps, box.ceilings.cpu_tflops, box.ceilings.nvme_gbps)
    return replace(
        box,
        free_vram=preset.free_bytes,
        vram=None,
        ceilings=ceilings,
        efficiency=box.efficiency if box.has_gpu else H200_BOX,
        preset=preset,
    )


def _given(what: str, value: float | None, text: str, option: str) -> str:
    return f"{what}: {text}, {'as given' if value else f'assumed; {option} says otherwise'}"


def _enough_ram(config: ModelConfig) -> int:
    """The next size that holds all experts beside the system's share."""
    needed = config.experts_bytes / (1 - SYSTEM_SHARE) + (16 << 30)
    return int(-(-needed // ASSUMED_RAM_STEP)) * ASSUMED_RAM_STEP


def _this_box(options: BoxOptions, config: ModelConfig, folders: Sequence[Path], measure: bool) -> Box | None:
    device = open_device("cuda") if torch.cuda.is_available() and options.gpu is None else None
    known = _Known(MachineProfile.load(), config, device, folders, measure)
    ceilings, efficiency = known.ceilings(), known.efficiency()
    if ceilings is None or efficiency is None:
        return None
    sources = [f"bandwidths: of this box, kept in its profile ({cpu_identity()})"]
    disk = known.disk()
    if known.measured and not known.quiet:
        sources.append(
            "other programs keep this box busy: what was measured now is too low, and was not kept"
        )
    if options.nvme_gbps or not (disk or ceilings.nvme_gbps):
        nvme_gbps = options.nvme_gbps or ASSUMED_NVME_GBPS
        fix = "assumed; `moebox doctor MODEL` measures it, --nvme-gbps says otherwise"
        sources.append(f"disk: {nvme_gbps:g} GB/s, {'as given' if options.nvme_gbps else fix}")
        ceilings = replace(ceilings, nvme_gbps=nvme_gbps)
    elif disk:
        # Experts of a small model come faster from a host's cache than a drive was measured to read.
        ceilings = replace(ceilings, nvme_gbps=max(ceilings.nvme_gbps, disk.gbps))
        efficiency = replace(efficiency, nvme=disk.gbps / ceilings.nvme_gbps, read_s=disk.latency_s)
        sources.append(f"disk: experts of this model are read at {disk.gbps:.2f} GB/s, as measured")
    if options.ram_gbps:
        ceilings = replace(ceilings, ram_gbps=options.ram_gbps)
        sources.append(f"RAM: {options.ram_gbps:g} GB/s, as given")
    sources.append(f"what is lost against bandwidths: {efficiency.source}")
    gpu = torch.cuda.get_device_name(device.torch_device) if device else "no GPU"
    return Box(
        f"this box: {cpu_name()}, {cpu.allowed_cpus()} cores, {gpu}",
        device.free_vram_bytes() if device else 0,
        options.vram if device else None,
        available_ram_bytes(),
        options.ram,
        ceilings,
        efficiency,
        sources=tuple(sources),
    )


class _Known:
    """What the machine's profile knows; with `measure` what it lacks is measured, and kept there."""

    def __init__(
        self,
        profile: MachineProfile,
        config: ModelConfig,
        device: Device | None,
        folders: Sequence[Path],
        measure: bool,
    ) -> None:
        self.profile, self.config, self.device = profile, config, device
        self.folders, self.measure = folders, measure
        self.measured = False
        self.drives = sorted({drive_at(folder).identity for folder in folders})

    def ceilings(self) -> Ceilings | None:
        """Of CPU, GPU and drives; as in `moebox doctor` with experts of K2's size, which no cache holds."""
        shape, identity = shape_config("kimi-k2"), cpu_identity()
        device = self.device
        gpu = gpu_identity(device.torch_device) if device else None
        if not self._figures("cpu", identity, lambda: cpu_figures(shape, cpu.ThreadPool())):
            return None
        if device and gpu:
            pool = cpu.ThreadPool()
            if not self._figures("gpu", gpu, lambda: gpu_figures(shape, pool, device)):
                return None
        return self.profile.ceilings(gpu=gpu, drives=self.drives)

    def efficiency(self) -> Efficiency | None:
        """What runs lose; with a GPU what was measured on another box."""
        if self.device:
            return H200_BOX
        identity, ceilings = f"{cpu_identity()}; widths {_widths(self.config)}", self.ceilings()
        if ceilings is None:
            return None
        part = self._figures("run", identity, lambda: _probe_cpu(self.config, ceilings), Efficiency.NAMES)
        if part is None:
            return None
        return Efficiency.from_figures(part.figures, f"measured on this box, {part.measured[:10]}")

    def disk(self) -> ColdReads | None:
        """What reading this model's experts takes; None where they are not here, not INT4
        yet, or so few that RAM must hold them all."""
        if self.device or not self.folders or self.config.n_keys <= least_ram_rows(self.config):
            return None
        identity = f"{'; '.join(self.drives)}; experts of {self.config.expert_bytes} bytes"
        names = {field.name for field in fields(ColdReads)}
        part = self._figures("run", identity, lambda: _probe_disk(self.folders), names)
        return None if part is None else ColdReads(**part.figures)

    def _figures(
        self,
        kind: Kind,
        identity: str,
        found: Callable[[], Mapping[str, float]],
        names: Set[str] = frozenset(),
    ) -> Part | None:
        """What is known, or `found`; figures of another version, which lack a name, are measured again."""
        part = self.profile.find(kind, identity)
        if part is not None and not names <= part.figures.keys():
            part = None
        if part is not None or not self.measure:
            return part
        self.measured = True
        quiet = self.quiet  # before the measurement keeps the cores busy itself
        try:
            part = self.profile.put(kind, identity, found())
        except CheckpointError as error:
            log.info("%s: %s", identity, error.what)
            return None
        if quiet:
            self.profile.save()
        return part

    @cached_property
    def quiet(self) -> bool:
        """Whether the cores are free: what is measured beside other programs is not kept."""
        return cpu_checks.load(cpu_checks.busy_cpus(), cpu.allowed_cpus()).status == "pass"


def _probe_cpu(config: ModelConfig, ceilings: Ceilings) -> dict[str, float]:
    from moebox.instruments.plan.probe import probe_cpu  # what it imports is of no use to most plans

    return probe_cpu(config, ceilings).figures()


def _probe_disk(folders: Sequence[Path]) -> dict[str, float]:
    from moebox.instruments.plan.probe import probe_disk

    return asdict(probe_disk(folders[0], folders[1:]))


def _widths(config: ModelConfig) -> str:
    """What a layer's time depends on."""
    widths = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_attention_heads,
        config.num_experts_per_tok,
        config.n_shared_experts,
    )
    return "-".join(map(str, widths))
