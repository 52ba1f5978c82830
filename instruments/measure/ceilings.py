"""Ceilings of the box, measured in about two seconds before a benchmark: reads, copies, products.

Each measurement takes memory of its own and gives it back. The experts of a large model take more memory than
the CPU's caches hold, so that memory is measured and not a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moebox import _kernels
from moebox.config import ModelConfig
from moebox.instruments.measure.timing import fastest_seconds
from moebox.kernels import cpu
from moebox.offload.device.base import Device, Event
from moebox.offload.machine.floor import Ceilings, expert_flops
from moebox.offload.machine.hardware import available_ram_bytes
from moebox.offload.memory.ram_slab import RamSlab, row_stride
from moebox.units import GIGA, TERA

READ_BYTES = 1 << 30
"""RAM that is read, at most: far more than the last-level cache."""
HBM_BYTES = 1 << 30
"""GPU memory that is read, at most."""
BESIDE_S = 0.4
"""How long uploads and reads of RAM run at the same time."""
REPEATS = 5
"""The best of so many measurements counts."""
UPLOAD_SLOTS = 16
"""Experts that are copied one after the other in one measurement."""
CPU_TOKENS = 128
"""Tokens per expert with which the CPU's kernel computes at its full rate."""
CPU_EXPERTS = 4
CPU_REPEATS = 3


def measure_ceilings(config: ModelConfig, pool: cpu.ThreadPool, device: Device | None = None) -> Ceilings:
    """Measure the box with experts of `config`'s size; figures of the GPU stay 0 without a `device`.

    Raises:
        PlanError: there is no memory for it, `READ_BYTES` at most.
    """
    figures = cpu_figures(config, pool)
    if device is not None:
        figures |= gpu_figures(config, pool, device)
    return Ceilings(**figures)


def cpu_figures(config: ModelConfig, pool: cpu.ThreadPool) -> dict[str, float]:
    """The fields of `Ceilings` that need no GPU; raises as `measure_ceilings`."""
    with _rows(config, None) as ram:
        ram.fill_synthetic(keys=range(min(CPU_EXPERTS, ram.n_rows)))
        return {
            "ram_gbps": max(_read_gbps(pool, ram) for _ in range(REPEATS)),
            "cpu_tflops": _cpu_tflops(config, pool, ram),
        }


@contextmanager
def _rows(config: ModelConfig, device: Device | None) -> Iterator[RamSlab]:
    room = min(READ_BYTES, available_ram_bytes() // 8)
    ram = RamSlab(config, max(1, min(room // row_stride(config), config.n_keys)), device)
    try:
        yield ram
    finally:
        ram.close()


def _read_gbps(pool: cpu.ThreadPool, ram: RamSlab) -> float:
    return _kernels.read_bandwidth(pool, [row[: ram.layout.nbytes] for row in ram.slab])


def _cpu_tflops(config: ModelConfig, pool: cpu.ThreadPool, ram: RamSlab) -> float:
    """Rate of the expert kernel with so many tokens that arithmetic, not memory, limits it."""
    n = min(CPU_EXPERTS, ram.n_rows)
    hidden = torch.randn(CPU_TOKENS, config.hidden_size).bfloat16()
    out = torch.zeros(CPU_TOKENS, config.hidden_size)
    offsets = torch.arange(n + 1, dtype=torch.int32) * CPU_TOKENS
    tokens = torch.arange(CPU_TOKENS, dtype=torch.int32).repeat(n)
    weights = torch.full((n * CPU_TOKENS,), 0.1)
    experts = [ram.expert(row) for row in range(n)]

    def compute() -> None:
        cpu.experts_forward(pool, experts, offsets, tokens, weights, hidden, out)

    flops = n * CPU_TOKENS * expert_flops(config)
    return flops / fastest_seconds(compute, CPU_REPEATS) / TERA


def gpu_figures(config: ModelConfig, pool: cpu.ThreadPool, device: Device) -> dict[str, float]:
    """The fields of `Ceilings` that need a GPU; raises as `measure_ceilings`."""
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
    begin, end = _queue_uploads(device, slots, ram, UPLOAD_SLOTS)
    end.synchronize()
    return UPLOAD_SLOTS * ram.stride / end.seconds_since(begin) / GIGA


def _queue_uploads(device: Device, slots: Tensor, ram: RamSlab, count: int) -> tuple[Event, Event]:
    """Start `count` uploads, and return the marks before and after them."""
    begin = device.uploads.record()
    for i in range(count):
        device.uploads.copy(slots[i % UPLOAD_SLOTS], ram.slab[i % ram.n_rows])
    return begin, device.uploads.record()


def _download_gbps(device: Device, slots: Tensor, ram: RamSlab) -> float:
    begin = device.downloads.record()
    for i in range(UPLOAD_SLOTS):
        device.downloads.copy(ram.slab[i % ram.n_rows], slots[i])
    end = device.downloads.record()
    end.synchronize()
    return UPLOAD_SLOTS * ram.stride / end.seconds_since(begin) / GIGA


def _both_gbps(
    device: Device, slots: Tensor, ram: RamSlab, pool: cpu.ThreadPool, pcie_gbps: float
) -> tuple[float, float]:
    """GB/s of uploads and of the CPU's reads of RAM while both run at the same time."""
    count = max(UPLOAD_SLOTS, min(int(BESIDE_S * pcie_gbps * GIGA / ram.stride), 1024))
    begin, end = _queue_uploads(device, slots, ram, count)
    reads = [_read_gbps(pool, ram)]
    while not end.done():
        reads.append(_read_gbps(pool, ram))
    end.synchronize()
    if len(reads) > 1:
        reads.pop()  # the uploads ended during this read
    return count * ram.stride / end.seconds_since(begin) / GIGA, sum(reads) / len(reads)


def _hbm_gbps(device: Device) -> tuple[float, float]:
    """GB/s of a copy, counting reads and writes, and of a sum, which only reads."""
    nbytes = min(HBM_BYTES, device.free_vram_bytes() // 8)
    source = device.empty((nbytes // 4,), torch.float32).fill_(1.0)
    target = device.empty((nbytes // 4,), torch.float32)
    copy_s = _device_seconds(device, lambda: target.copy_(source))
    read_s = _device_seconds(device, source.sum)
    return 2 * source.nbytes / copy_s / GIGA, source.nbytes / read_s / GIGA


def _gpu_tflops(device: Device) -> float:
    """Rate of bf16 products of square matrices, small ones on the stand-in device."""
    size = 8192 if device.torch_device.type == "cuda" else 256
    a = device.empty((size, size), torch.bfloat16).fill_(0.5)
    return 2 * size**3 / _device_seconds(device, lambda: a @ a) / TERA


def _device_seconds(device: Device, call: Callable[[], object]) -> float:
    """Seconds of the fastest of `REPEATS` calls, each between two marks on the compute stream."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = device.mark()
        call()
        end = device.mark()
        end.synchronize()
        times.append(end.seconds_since(begin))
    return min(times)
