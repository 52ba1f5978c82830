"""The box that a plan is for: this box as it was measured, or another one that its parts describe."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch

from moebox.config import ModelConfig
from moebox.errors import CheckpointError, PlanError
from moebox.instruments.measure import cpu_load
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
"""Bandwidth of a drive that was neither measured nor given."""
RAM_STEP = 64 << 30
"""RAM is sold in steps of so many bytes."""
BESIDE_EXPERTS_BYTES = 16 << 30
"""What RAM that is assumed to hold all experts has room for beside them."""


@dataclass(frozen=True)
class BoxOptions:
    """The box as the user describes it; None: what this box has.

    Attributes:
        gpu: name of a preset, which means another box; "none": another box without a GPU.
        vram, ram: bytes; of another box all that it has, of this box what may be used. More RAM than this box
            has means another box, too.
        nvme_gbps: bandwidth of all drives together, reading.
        ram_gbps: bandwidth of RAM, reading.
    """

    gpu: str | None = None
    vram: int | None = None
    ram: int | None = None
    nvme_gbps: float | None = None
    ram_gbps: float | None = None


@dataclass(frozen=True)
class Box:
    """Memory of a box, and how fast it is.

    Attributes:
        name: for people.
        free_vram, free_ram: bytes that a program finds free; no free VRAM means no GPU.
        vram, ram: budgets within that; None: all VRAM, and all RAM but the system's share.
        ceilings: measured or assumed bandwidths and rates.
        efficiency: shares of the ceilings that the code reaches.
        preset: the GPU's data sheet, where the GPU is not in this machine.
        sources: lines that say where the figures come from.
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
        """Whether the box has a GPU."""
        return self.free_vram > 0

    @property
    def vram_room(self) -> int:
        """Bytes of VRAM that moebox may take."""
        return self.free_vram if self.vram is None else self.vram

    @property
    def ram_room(self) -> int:
        """Bytes of RAM that moebox may take."""
        return ram_room_bytes(self.ram, self.free_ram)


def find_box(
    options: BoxOptions, config: ModelConfig, folders: Sequence[Path], *, measure: bool = True
) -> Box | None:
    """The box that `options` describe, for a model whose shards are in `folders`.

    Figures of this box that its profile lacks are measured now, which takes some seconds, and kept in the
    profile. Without `measure` the result is None if figures are missing.

    Raises:
        PlanError: the GPU has no preset, or a bandwidth or the RAM is not above 0.
    """
    for name in ("nvme_gbps", "ram_gbps", "ram"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise PlanError(f"{name} = {value}: must be above 0")
    if options.gpu is not None or (options.ram or 0) > available_ram_bytes():
        return _other_box(options, config)
    return _this_box(options, config, folders, measure)


def _other_box(options: BoxOptions, config: ModelConfig) -> Box:
    preset = None if options.gpu in (None, "none") else find_preset(str(options.gpu))
    ram_gbps = options.ram_gbps or REFERENCE_RAM_GBPS
    nvme_gbps = options.nvme_gbps or ASSUMED_NVME_GBPS
    ram = options.ram or ram_to_buy(config.experts_bytes / (1 - SYSTEM_SHARE) + BESIDE_EXPERTS_BYTES)
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
    sources.append(_losses(efficiency))
    name = f"{name}, {gib(ram)} of RAM, disk {nvme_gbps:g} GB/s"
    return Box(name, memory, None, ram, None, ceilings, efficiency, preset, tuple(sources))


def with_gpu(box: Box, preset: GpuPreset) -> Box:
    """The same box with the preset's GPU instead of its own or none."""
    ceilings = preset.ceilings(box.ceilings.ram_gbps, box.ceilings.cpu_tflops, box.ceilings.nvme_gbps)
    return replace(
        box,
        free_vram=preset.free_bytes,
        vram=None,
        ceilings=ceilings,
        efficiency=box.efficiency if box.has_gpu else H200_BOX,
        preset=preset,
    )


def ram_to_buy(nbytes: float, step: int = RAM_STEP) -> int:
    """`nbytes` rounded up to a multiple of `step`."""
    return math.ceil(nbytes / step) * step


def _given(what: str, value: float | None, text: str, option: str) -> str:
    return f"{what}: {text}, {'as given' if value else f'assumed; {option} says otherwise'}"


def _losses(efficiency: Efficiency) -> str:
    return f"what is lost against bandwidths: {efficiency.source}"


def _this_box(options: BoxOptions, config: ModelConfig, folders: Sequence[Path], measure: bool) -> Box | None:
    device = open_device("cuda") if torch.cuda.is_available() and options.gpu is None else None
    figures = _BoxFigures(MachineProfile.load(), config, device, folders, measure)
    ceilings, efficiency = figures.ceilings(), figures.efficiency()
    if ceilings is None or efficiency is None:
        return None
    cold_reads = figures.cold_reads()
    sources = [f"bandwidths: of this box, kept in its profile ({cpu_identity()})"]
    if figures.measured and not figures.quiet:
        sources.append(
            "other programs keep this box busy: what was measured now is too low, and was not kept"
        )
    ceilings, efficiency, disk_source = _with_disk(ceilings, efficiency, options.nvme_gbps, cold_reads)
    sources += disk_source
    if options.ram_gbps:
        ceilings = replace(ceilings, ram_gbps=options.ram_gbps)
        sources.append(f"RAM: {options.ram_gbps:g} GB/s, as given")
    sources.append(_losses(efficiency))
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


def _with_disk(
    ceilings: Ceilings, efficiency: Efficiency, given_gbps: float | None, cold_reads: ColdReads | None
) -> tuple[Ceilings, Efficiency, list[str]]:
    """Add the disk to ceilings and efficiency: as given, else as experts were read, else as the drive was
    measured, else as assumed. The list has the line about its source."""
    if given_gbps or not (cold_reads or ceilings.nvme_gbps):
        nvme_gbps = given_gbps or ASSUMED_NVME_GBPS
        fix = "assumed; `moebox doctor MODEL` measures it, --nvme-gbps says otherwise"
        source = f"disk: {nvme_gbps:g} GB/s, {'as given' if given_gbps else fix}"
        return replace(ceilings, nvme_gbps=nvme_gbps), efficiency, [source]
    if cold_reads is None:
        return ceilings, efficiency, []
    # A virtual machine's host may cache a small model, whose experts then come faster than the drive reads.
    ceilings = replace(ceilings, nvme_gbps=max(ceilings.nvme_gbps, cold_reads.gbps))
    reached = cold_reads.gbps / ceilings.nvme_gbps
    source = f"disk: experts of this model are read at {cold_reads.gbps:.2f} GB/s, as measured"
    return ceilings, replace(efficiency, nvme=reached, read_s=cold_reads.latency_s), [source]


class _BoxFigures:
    """Figures of this box from its profile; with `measure` a missing figure is measured and kept there.

    Attributes:
        measured: whether anything was measured.
    """

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
        """Of CPU, GPU and drives, with experts of K2's size, which no cache holds, as in `moebox doctor`."""
        shape, identity = shape_config("kimi-k2"), cpu_identity()
        device = self.device
        gpu = gpu_identity(device.torch_device) if device else None
        if not self._find("cpu", identity, lambda: cpu_figures(shape, cpu.ThreadPool())):
            return None
        if device and gpu:
            pool = cpu.ThreadPool()
            if not self._find("gpu", gpu, lambda: gpu_figures(shape, pool, device)):
                return None
        return self.profile.ceilings(gpu=gpu, drives=self.drives)

    def efficiency(self) -> Efficiency | None:
        """What the code reaches of the ceilings; with a GPU as it was measured on the H200's box."""
        if self.device:
            return H200_BOX
        identity, ceilings = f"{cpu_identity()}; widths {_widths(self.config)}", self.ceilings()
        if ceilings is None:
            return None
        part = self._find("run", identity, lambda: _probe_cpu(self.config, ceilings), Efficiency.NAMES)
        if part is None:
            return None
        return Efficiency.from_figures(part.figures, f"measured on this box, {part.measured[:10]}")

    def cold_reads(self) -> ColdReads | None:
        """How fast experts of this model are read.

        None with a GPU, without the model's folder, for experts that are not INT4 yet, and for a model so
        small that RAM holds all of its experts.
        """
        if self.device or not self.folders or self.config.n_keys <= least_ram_rows(self.config):
            return None
        identity = f"{'; '.join(self.drives)}; experts of {self.config.expert_bytes} bytes"
        names = {field.name for field in fields(ColdReads)}
        part = self._find("run", identity, lambda: _probe_disk(self.folders), names)
        return None if part is None else ColdReads(**part.figures)

    def _find(
        self,
        kind: Kind,
        identity: str,
        measurement: Callable[[], Mapping[str, float]],
        names: Set[str] = frozenset(),
    ) -> Part | None:
        """The profile's figures, or those of `measurement`.

        Figures of another version of moebox, which lack one of `names`, are measured again.
        """
        part = self.profile.find(kind, identity)
        if part is not None and not names <= part.figures.keys():
            part = None
        if part is not None or not self.measure:
            return part
        self.measured = True
        quiet = self.quiet  # asked before the measurement itself uses the cores
        try:
            part = self.profile.put(kind, identity, measurement())
        except CheckpointError as error:
            log.info("%s: %s", identity, error.what)
            return None
        if quiet:
            self.profile.save()
        return part

    @cached_property
    def quiet(self) -> bool:
        """Whether the cores are free; figures that are measured beside other programs are not kept."""
        return cpu_load.is_quiet(cpu_load.busy_cpus(), cpu.allowed_cpus())


def _probe_cpu(config: ModelConfig, ceilings: Ceilings) -> dict[str, float]:
    from moebox.instruments.plan.probe import probe_cpu  # imports much that other plans do not need

    return probe_cpu(config, ceilings).figures()


def _probe_disk(folders: Sequence[Path]) -> dict[str, float]:
    from moebox.instruments.plan.probe import probe_disk

    return asdict(probe_disk(folders[0], folders[1:]))


def _widths(config: ModelConfig) -> str:
    """The sizes that a layer's time depends on."""
    widths = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_attention_heads,
        config.num_experts_per_tok,
        config.n_shared_experts,
    )
    return "-".join(map(str, widths))
