"""`moebox doctor`: makes every check in turn, and writes what it measured to the machine's profile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from moebox.errors import MoeboxError
from moebox.files import free_bytes
from moebox.folders import data_folder
from moebox.instruments.doctor.checks import checkpoint, cpu, drives, gpu, memory, software
from moebox.instruments.doctor.checks.base import Check, Roots, Topic
from moebox.instruments.doctor.checks.checkpoint import Say
from moebox.instruments.measure.ceilings import cpu_figures, gpu_figures
from moebox.instruments.measure.cpu_load import busy_cpus
from moebox.instruments.measure.random_model import shape_config
from moebox.kernels.cpu import ThreadPool
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.device.registry import open_device
from moebox.offload.disk.store import PIECE_BYTES
from moebox.offload.machine.drive_speed import DriveSpeed, measure_drive
from moebox.offload.machine.drives import Drive, drive_at
from moebox.offload.machine.hardware import cpu_identity, gpu_identity
from moebox.offload.machine.profile import Kind, MachineProfile, profile_path

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class DoctorOptions:
    """What is checked besides the machine.

    Attributes:
        model: a model's folder.
        stores: more folders with its shards.
        deep: read all its bytes.
    """

    model: Path | None = None
    stores: Sequence[Path] = ()
    deep: bool = False


@dataclass
class DoctorReport:
    """All checks in their order, and the file of the machine's profile."""

    checks: list[Check] = field(default_factory=list)
    profile: Path = field(default_factory=profile_path)

    @property
    def failed(self) -> bool:
        """Whether a check fails."""
        return any(check.status == "fail" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "checks": [check.to_dict() for check in self.checks],
            "failed": self.failed,
            "profile": str(self.profile),
        }


def examine(options: DoctorOptions, say: Say = lambda text: None) -> DoctorReport:
    """Make all checks, and keep what was measured in the user's profile.

    Args:
        options: the model, if there is one.
        say: called with what is being done.
    """
    return DoctorReport(list(_Examination(options, say).checks()))


class _Examination:
    """The checks of one run, which share what they find and measure."""

    def __init__(self, options: DoctorOptions, say: Say) -> None:
        self.options, self.say = options, say
        self.roots = Roots()
        self.profile = MachineProfile.load()
        self.gpus = gpu.find_gpus()
        self.model: Checkpoint | None = None
        self.is_busy = False
        self.kept_earlier = False

    def checks(self) -> Iterator[Check]:
        """In the order in which they are shown."""
        yield from self._software()
        yield from self._model()
        yield from self._machine()
        yield from self._measured()
        yield from self._drives()
        yield self._keep_profile()

    def _software(self) -> Iterator[Check]:
        yield software.python()
        yield software.torch(software.installed("torch"))
        yield software.triton(software.installed("triton"), bool(self.gpus))

    def _model(self) -> Iterator[Check]:
        if self.options.model is None:
            yield Topic("model.files").skipped("no MODEL was given", "`moebox doctor MODEL` looks at it.")
            return
        self.say(f"reading the headers of {self.options.model}")
        check, self.model = checkpoint.files(self.options.model, self.options.stores)
        yield check
        if self.model is not None:
            yield checkpoint.experts(self.model)
            yield checkpoint.tokenizer(self.model)
            yield checkpoint.checksums(self.model, self.options.deep, self.say)

    def _machine(self) -> Iterator[Check]:
        config = self.model.config if self.model else None
        yield cpu.instruction_set()
        yield cpu.cores()
        yield cpu.numa(self.roots)
        yield memory.size(config, vram=self.gpus[0].free_bytes if self.gpus else 0)
        yield memory.limits()
        yield memory.huge_pages(self.roots)
        yield memory.locked(bool(self.gpus))
        yield from gpu.device(self.gpus, self.roots)
        yield gpu.driver(self.gpus)

    def _measured(self) -> Iterator[Check]:
        """Measure RAM, CPU and the first GPU with experts of K2's size, which no cache holds."""
        config, pool = shape_config("kimi-k2"), ThreadPool()
        self.say("looking whether the cores are free")
        load = cpu.load(busy_cpus(), pool.threads)
        self.is_busy = load.status == "warn"
        yield load
        self.say("reading memory")
        identity = cpu_identity(pool.threads)
        figures = _try(lambda: cpu_figures(config, pool))
        yield memory.bandwidth(figures, pool.threads, self.profile.find("cpu", identity))
        self._keep("cpu", identity, figures, "ram_gbps")
        if not self.gpus:
            yield gpu.pcie(None, {})
            return
        self.say("copying to the GPU and back")
        device = open_device("cuda:0")
        figures = _try(lambda: gpu_figures(config, pool, device))
        yield gpu.pcie(self.gpus[0], figures)
        self._keep("gpu", gpu_identity(device.torch_device), figures, "pcie_gbps")

    def _drives(self) -> Iterator[Check]:
        """Measure every drive that shards lie on; then look for free space."""
        if self.model is None:
            yield drives.not_measured()
        else:
            for drive, files in _by_drive(self.model).items():
                yield drives.kind(drive)
                yield from drives.links(drive, self.roots)
                self.say(f"reading {drive.name}")
                speed = _try(partial(measure_drive, files, PIECE_BYTES))
                yield drives.bandwidth(drive, speed, self.profile.find("drive", drive.identity))
                if isinstance(speed, DriveSpeed) and speed.direct:
                    self._keep("drive", drive.identity, speed.figures(), "gbps")
        yield drives.space(data_folder(), "statistics and the machine's profile", free_bytes(data_folder()))

    def _keep(self, kind: Kind, identity: str, figures: Mapping[str, float] | Exception, name: str) -> None:
        """Keep figures in the profile; on a busy machine only if `name` is better than the profile's."""
        if isinstance(figures, Exception):
            return
        before = self.profile.find(kind, identity)
        if self.is_busy and before is not None and before.figures.get(name, 0.0) > figures[name]:
            self.kept_earlier = True
            return
        self.profile.put(kind, identity, figures)

    def _keep_profile(self) -> Check:
        topic, path = Topic("profile"), profile_path()
        if self.profile.save():
            kept = "; those of an idler machine were not replaced" if self.kept_earlier else ""
            return topic.passed(f"bandwidths are kept in {path}{kept}")
        return topic.warning(
            f"{path} cannot be written",
            "`moebox plan` and loading start from assumed bandwidths instead of this machine's.",
            "Make the folder writable, or name another by XDG_DATA_HOME.",
        )


def _try(measure: Callable[[], Measured]) -> Measured | Exception:
    """What `measure` returns, or its error: no memory, a broken file."""
    try:
        return measure()
    except (MoeboxError, OSError, torch.OutOfMemoryError) as error:
        return error


def _by_drive(model: Checkpoint) -> dict[Drive, list[Path]]:
    """All files of shards, copies included, by the drive that they lie on."""
    found: dict[Drive, list[Path]] = {}
    for paths in model.shards.values():
        for path in paths:
            found.setdefault(drive_at(path), []).append(path)
    return found
