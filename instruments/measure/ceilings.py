"""What the box can do at best, measured in about two seconds before a benchmark: reads, copies, products.

Everything uses memory of its own, which is given back, and more of it than caches hold where the model is
large enough.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moebox import _kernels
from moebox.config import ModelConfig
from moebox.kernels import cpu
from moebox.offload.device.base import Device
from moebox.offload.machine.floor import Ceilings, expert_flops
from moebox.offload.machine.hardware import available_ram_bytes
from moebox.offload.memory.ram_slab import RamSlab, row_stride
from moebox.units import GIGA, TERA

READ_BYTES = 1 << 30
"""RAM that is read: far more than the last-level cache."""
HBM_BYTES = 1 << 30
BESIDE_S = 0.4
"""How long both roads run at the same time."""
REPEATS = 5
UPLOAD_SLOTS = 16
CPU_TOKENS = 128
"""Tokens per expert from which the CPU's kernel computes at its full rate."""
CPU_EXPERTS = 4


def measure_ceilings(config: ModelConfig, pool: cpu.ThreadPool, device: Device | None = None) -> Ceilings:
    """Measure the box with experts of `config`'s size; the GPU's figures only with a `device`.

    Raises:
        PlanError: the memory for it, `READ_BYTES` at most, is not to be had.
    """
    figures = cpu_figures(config, pool)
    if device is not None:
        figures |= gpu_figures(config, pool, device)
    return Ceilings(**figures)


def cpu_figures(config: ModelConfig, pool: cpu.ThreadPool) -> dict[str, float]:
    """Those of `Ceilings` that need no GPU; raises as `measure_ceilings`."""
    with _rows(config, None) as ram:
        ram.fill_synthetic(keys=range(min(CPU_EXPERTS, ram.n_rows)))
        return {
            "ram_gbps": max(_read_gbps(pool, ram) for _ in range(REPEATS)),
            "cpu_tflops": _cpu_tflops(config, pool, ram),
        }


@contextmanager
def _rows(config: ModelConfig, device: Device | None) -> Iterator[RamSlab]:
    room = min(READ_BYTES, available_ram_bytes() // 8)
    n_keys = config.n_keys
    ram = RamSlab(config, max(1, min(room // row_stride(config), n_keys)), device)
    try:
        yield ram
    finally:
        ram.close()


def _read_gbps(pool: cpu.ThreadPool, ram: RamSlab) -> float:
    return _kernels.read_bandwidth(pool, [row[: ram.layout.nbytes] for row in ram.slab])


def _cpu_tflops(config: ModelConfig, pool: cpu.ThreadPool, ram: RamSlab) -> float:
    """The expert kernel's own rate where it is bound by arithmetic."""
    n = min(CPU_EXPERTS, ram.n_rows)
    hidden = torch.randn(CPU_TOKENS, config.hidden_size).bfloat16()
    out = torch.zeros(CPU_TOKENS, config.hidden_size)
    offsets = torch.arange(n + 1, dtype=torch.int32) * CPU_TOKENS
    tokens = torch.arange(CPU_TOKENS, dtype=torch.int32).repeat(n)
    weights = torch.full((n * CPU_TOKENS,), 0.1)
    experts = [ram.expert(row) for row in range(n)]

    def compute() -> None:
        cpu.experts_forward(pool, experts, offsets, tokens, weights, hidden, out)

    best_s = min(_seconds(compute) for _ in range(3))
    return n * CPU_TOKENS * expert_flops(config) / best_s / TERA


def gpu_figures(config: ModelConfig, pool: cpu.ThreadPool, device: Device) -> dict[str, float]:
    """Those of `Ceilings` that a GPU has its part in; raises as `measure_ceilings`."""
    with _rows(config, device) as ram:
        slots = device.empty((UPLOAD_SLOTS, ram.stride), torch.uint8)
        pcie_gbps = max(_upload_gbps(device, slots, ram) for _ in range(REPEATS))
        down_gbps = max(_download_gbps(device, slots, ram) for _ in range(REPEATS))
        beside_pcie, beside_ram = _both_gbps(device, slots, ram, pool, pcie_gbps)
    copy_gbps, read_gbps = _hbm_gbps(device)
    return {
        "pcie_gbps": pcie_gbps,
        "pcie_down_gbps": down_gbps,
        "pcie_beside_gbps": beside_pcie,
        "ram_beside_gbps": beside_ram,
        "hbm_copy_gbps": copy_gbps,
        "hbm_gbps": read_gbps,
        "gpu_tflops": _gpu_tflops(device),
    }


def _upload_gbps(device: Device, slots: Tensor, ram: RamSlab) -> float:
    begin = device.uploads.record()
    _queue_uploads(device, slots, ram, UPLOAD_SLOTS)
    end = device.uploads.record()
    end.synchronize()
    return UPLOAD_SLOTS * ram.stride / end.seconds_since(begin) / GIGA


def _download_gbps(device: Device, slots: Tensor, ram: RamSlab) -> float:
    begin = device.downloads.record()
    for i in range(UPLOAD_SLOTS):
        device.downloads.copy(ram.slab[i % ram.n_rows], slots[i])
    end = device.downloads.record()
    end.synchronize()
    return UPLOAD_SLOTS * ram.stride / end.seconds_since(begin) / GIGA


def _queue_uploads(device: Device, slots: Tensor, ram: RamSlab, count: int) -> None:
    for i in range(count):
        device.uploads.copy(slots[i % UPLOAD_SLOTS], ram.slab[i % ram.n_rows])


def _both_gbps(
    device: Device, slots: Tensor, ram: RamSlab, pool: cpu.ThreadPool, pcie_gbps: float
) -> tuple[float, float]:
    """GB/s of uploads and of reads, at the same time."""
    count = max(UPLOAD_SLOTS, min(int(BESIDE_S * pcie_gbps * GIGA / ram.stride), 1024))
    begin = device.uploads.record()
    _queue_uploads(device, slots, ram, count)
    end = device.uploads.record()
    reads = [_read_gbps(pool, ram)]
    while not end.done():
        reads.append(_read_gbps(pool, ram))
    end.synchronize()
    if len(reads) > 1:
        reads.pop()  # the uploads ended within it
    return count * ram.stride / end.seconds_since(begin) / GIGA, sum(reads) / len(reads)


def _hbm_gbps(device: Device) -> tuple[float, float]:
    """GB/s of a copy, reads and writes together, and of a sum, which only reads."""
    nbytes = min(HBM_BYTES, device.free_vram_bytes() // 8)
    source = device.empty((nbytes // 4,), torch.float32).fill_(1.0)
    target = device.empty((nbytes // 4,), torch.float32)
    copy_s = _device_seconds(device, lambda: target.copy_(source))
    read_s = _device_seconds(device, source.sum)
    return 2 * source.nbytes / copy_s / GIGA, source.nbytes / read_s / GIGA


def _gpu_tflops(device: Device) -> float:
    """bf16 products of square matrices; the stand-in, which is no GPU, does a small one."""
    size = 8192 if device.torch_device.type == "cuda" else 256
    a = device.empty((size, size), torch.bfloat16).fill_(0.5)
    return 2 * size**3 / _device_seconds(device, lambda: a @ a) / TERA


def _device_seconds(device: Device, call: Callable[[], object]) -> float:
    """The fastest of some calls, each between two marks on the compute stream."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = device.mark()
        call()
        end = device.mark()
        end.synchronize()
        times.append(end.seconds_since(begin))
    return min(times)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
