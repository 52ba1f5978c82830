"""The GPU: whether there is one that torch can use, its driver, and the bandwidth of PCIe."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moebox.instruments.doctor.checks.base import Check, Roots, Topic, read_text
from moebox.units import gib

NVIDIA = "0x10de"
DISPLAY = ("0x0300", "0x0302")
"""PCI classes: VGA controllers and 3D controllers."""
LEAST_CAPABILITY = (8, 0)
"""The first compute capability with arithmetic in bf16."""
FREE_SHARE = 0.9
"""Share of the GPU's memory that should be free."""
LINK_SHARE = 0.7
"""Share of the link's nominal rate that pinned copies should reach; they usually reach 0.85."""
LANE_GBPS = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}
"""GB/s of one lane in one direction, by PCIe generation."""


@dataclass(frozen=True)
class Link:
    """A GPU's PCIe link: generation and lanes in use, and the most that both GPU and slot support."""

    generation: int
    width: int
    most_generation: int
    most_width: int

    @property
    def gbps(self) -> float:
        """Nominal rate of the most that both sides support, in one direction."""
        return LANE_GBPS.get(self.most_generation, 0.0) * self.most_width


@dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    NVML gives `driver`, `driver_cuda` (the newest CUDA that the driver runs) and `link`; without NVML the
    three keep their defaults.
    """

    index: int
    name: str
    vram_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    link: Link | None = None


def find_gpus() -> list[Gpu]:
    """The CUDA devices that torch can use."""
    if not torch.cuda.is_available():
        return []
    return [_look(index) for index in range(torch.cuda.device_count())]


def _look(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    return Gpu(index, properties.name, total, free, capability, **_ask_nvml(str(properties.uuid)))


def _ask_nvml(uuid: str) -> dict[str, Any]:
    """`driver`, `driver_cuda` and `link` of a `Gpu`, as far as NVML reports them."""
    import pynvml

    found: dict[str, Any] = {}
    with suppress(pynvml.NVMLError):  # virtual machines hide the link
        pynvml.nvmlInit()
        cuda = pynvml.nvmlSystemGetCudaDriverVersion()
        found["driver_cuda"] = (cuda // 1000, cuda % 1000 // 10)
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        found["link"] = Link(
            pynvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            pynvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        )
    return found


def device(gpus: list[Gpu], roots: Roots, torch_cuda: str | None = torch.version.cuda) -> list[Check]:
    """One check for each GPU that torch can use; without any, one that says why.

    Args:
        gpus: that torch can use.
        roots: where the kernel lists the machine's cards.
        torch_cuda: the CUDA version that torch was built with; None for a CPU build.
    """
    if not gpus:
        return [_no_device(roots, torch_cuda)]
    return [_device(gpu) for gpu in gpus]


def _no_device(roots: Roots, torch_cuda: str | None) -> Check:
    topic = Topic("gpu.device")
    cards, driver = _nvidia_cards(roots), read_text(roots.proc / "driver/nvidia/version")
    if not cards and driver is None:
        return topic.skipped("no NVIDIA GPU in this machine: everything runs on the CPU")
    what = f"{len(cards)} NVIDIA GPU(s)" if cards else "an NVIDIA driver"
    if driver is None:
        seen = f"{what}, but no driver is loaded"
        fix = "Install NVIDIA's driver, and see that `nvidia-smi` lists the GPU."
    elif torch_cuda is None:
        seen = f"{what}, but torch is a build for the CPU only"
        fix = "Install the CUDA build of the same release, as https://pytorch.org/get-started tells."
    else:
        seen = f"{what} with a driver, but torch cannot open a device"
        fix = (
            "In a container, pass the GPU through (`docker run --gpus all`). Else update the driver to one "
            f"for CUDA {torch_cuda} or newer; `nvidia-smi` shows what it has."
        )
    return topic.warning(seen, "The GPU is not used: everything runs on the CPU.", fix)


def _nvidia_cards(roots: Roots) -> list[Path]:
    return [
        card
        for card in sorted((roots.sys / "bus/pci/devices").glob("*"))
        if read_text(card / "vendor") == NVIDIA and (read_text(card / "class") or "").startswith(DISPLAY)
    ]


def _device(gpu: Gpu) -> Check:
    figures = {"vram_bytes": float(gpu.vram_bytes), "free_bytes": float(gpu.free_bytes)}
    topic = Topic("gpu.device", f"cuda:{gpu.index}", figures)
    version = f"{gpu.capability[0]}.{gpu.capability[1]}"
    seen = f"{gpu.name}, compute {version}, {gib(gpu.free_bytes)} free of {gib(gpu.vram_bytes)}"
    if gpu.capability < LEAST_CAPABILITY:
        return topic.warning(
            seen,
            "GPUs before compute 8.0 have no arithmetic in bf16, which the kernels need.",
            "Use --device cpu, or a GPU from Ampere on.",
        )
    if gpu.free_bytes < FREE_SHARE * gpu.vram_bytes:
        return topic.warning(
            seen,
            "Other programs hold GPU memory: fewer experts stay on the GPU, more are moved for each token.",
            "`nvidia-smi` lists them; close those that are not needed.",
        )
    return topic.passed(seen)


def driver(gpus: list[Gpu], torch_cuda: str | None = torch.version.cuda) -> Check:
    """Whether the driver is new enough for torch's CUDA."""
    topic = Topic("gpu.driver")
    if not gpus:
        return topic.skipped("no GPU in use")
    first = gpus[0]
    if not first.driver or first.driver_cuda is None:
        return topic.warning(
            "NVML, the driver's own library, does not answer",
            "Energy is not measured, and neither driver nor PCIe link are known here.",
            "In a container, add the capability `utility` (NVIDIA_DRIVER_CAPABILITIES=compute,utility).",
        )
    cuda = ".".join(map(str, first.driver_cuda))
    seen = f"{first.driver}, for CUDA up to {cuda}; torch has {torch_cuda}"
    if torch_cuda and first.driver_cuda < (int(torch_cuda.partition(".")[0]), 0):
        return topic.warning(
            seen,
            "Kernels that are compiled at run time may not start on an older driver.",
            f"Update the driver to one for CUDA {torch_cuda}.",
        )
    return topic.passed(seen)


def pcie(gpu: Gpu | None, figures: Mapping[str, float] | Exception) -> Check:
    """Bandwidth between pinned memory and the GPU, beside the link's nominal rate.

    Args:
        gpu: that was measured; None: there is none.
        figures: fields of `Ceilings`, just measured; or the error of the measurement.
    """
    if gpu is None:
        return Topic("gpu.pcie").skipped("no GPU in use")
    subject, link = f"cuda:{gpu.index}", gpu.link
    if isinstance(figures, Exception):
        return Topic("gpu.pcie", subject).not_measured(figures)
    topic = Topic("gpu.pcie", subject, figures)
    up_gbps, down_gbps = figures["pcie_gbps"], figures["pcie_down_gbps"]
    seen = f"pinned memory to GPU {up_gbps:.1f} GB/s, back {down_gbps:.1f} GB/s"
    if link is None:
        return topic.passed(f"{seen}; the link is not known")
    seen += f"; PCIe {link.most_generation} x{link.width}"
    costs = "Experts that are not on the GPU arrive slower, and loading takes longer."
    if link.width < link.most_width:
        return topic.warning(
            f"{seen} of x{link.most_width}",
            costs,
            "Put the card into a slot with all its lanes (the board's manual tells which share theirs), and "
            "seat it and its riser anew.",
        )
    if min(up_gbps, down_gbps) < LINK_SHARE * link.gbps:
        return topic.warning(
            f"{seen} carries {link.gbps:.0f} GB/s",
            costs,
            "Run `moebox doctor` on the socket that the GPU is attached to (`numactl --cpunodebind`), and "
            "see in the firmware that the slot runs at its full generation.",
        )
    return topic.passed(seen)
