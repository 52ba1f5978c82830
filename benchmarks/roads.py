"""Speed of a decode step's two roads, PCIe and CPU, compared with what the machine can do.

    python benchmarks/roads.py --threads 13,14,15,16

K2's shape (H 7168, I 2048, top 8); each token has several MoE layers whose picks are never resident: 198 MB a
layer. The GPU runs one graph per token, which routes, waits for the host, computes the uploaded experts and
adds the CPU's sum; the host runs `DecodeHost.serve_token`. Modes: `cpu` (no slots, so the CPU computes all),
`both` (misses are split by the live averages of both speeds, one expert between GPU and CPU), and with
`--uploads 2,3,4` a fixed number of whole uploads.

Printed per mode and number of threads: ms a layer (a token's wall time over its layers, median), the GB/s of
each road while it worked, uploads a layer, and the time that the host adds to a layer: until the GPU can go
on with resident experts (listed), and until all uploads are queued and the CPU computes (schedule). The
ceilings are measured in the same run with the same threads: a read of RAM alone, uploads alone, and both at
once. Sums are compared with the CPU kernel's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox import _kernels
from moebox.config import ModelConfig, parse_config
from moebox.kernels import cpu
from moebox.offload.decode.host_step import FIELDS, DecodeHost
from moebox.offload.decode.mailbox import Mailbox
from moebox.offload.device.base import Device
from moebox.offload.device.registry import open_device
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.residency import Residency
from moebox.quantize.synth.shapes import synth_config

ERROR_BAR = 5e-3
GROUPS = 4
"""Tokens take turns with this many disjoint groups of experts, so that no pick is resident."""


def model(options: argparse.Namespace) -> ModelConfig:
    """`layers` MoE layers of GROUPS * k experts, at K2's shape or at a tiny one."""
    shape = {} if options.shape == "kimi-k2" else {"hidden_size": 256, "moe_intermediate_size": 64}
    raw = synth_config("kimi-k2", layers=1 + options.layers, experts=GROUPS * 8, overrides=shape)
    return parse_config(raw)


class Program:
    """The GPU's side of a token, and its buffers."""

    def __init__(self, config: ModelConfig, device: Device, slots: int, ram: Tensor) -> None:
        layers, self.k = len(config.moe_layers), config.num_experts_per_tok
        self.config, self.ops = config, device.ops
        self.box = Mailbox.allocate(device, layers, self.k, config.hidden_size)
        self.ram = ram
        self.slab = device.empty((max(slots, 1), ram.shape[1]), torch.uint8).zero_()
        self.hidden = torch.randn(config.hidden_size).bfloat16().to(device.torch_device)
        self.ids = device.empty((self.k,), torch.int32).zero_()
        self.weights = torch.rand(self.k).to(device.torch_device)
        self.sums = device.empty((layers, config.hidden_size), torch.float32).zero_()
        self.terms = device.empty((2, config.hidden_size), torch.float32).zero_()
        self.norm = device.empty((config.hidden_size,), torch.float32).fill_(1)
        self.box.raise_flags()
        gc.collect()  # an older graph that is freed during the capture would break it
        self.launch = device.compile(self.run)
        device.synchronize()

    def run(self) -> None:
        """Issue the operations of all layers."""
        box, ops, slab, x = self.box, self.ops, self.slab, self.hidden
        shape = (self.config.hidden_size, self.config.moe_intermediate_size)
        self.sums.zero_()
        for i in range(len(self.sums)):
            ops.post(
                self.ids, self.weights, self.hidden, box.ids[i], box.weights[i], box.hidden[i], box.routed[i]
            )
            ops.wait(box.listed[i])
            ops.experts_one(slab, shape, box.resident_slots[i], box.resident_weights[i], x, self.terms[0])
            ops.split_expert(self.ram, shape, box.split_expert[i], box.split_weight[i], x, self.terms[0])
            ops.wait(box.uploaded[i])
            ops.experts_one(slab, shape, box.upload_slots[i], box.upload_weights[i], x, self.terms[1])
            ops.wait(box.summed[i])
            ops.combine_norm(self.sums[i], [*self.terms, box.cpu_sums[i]], self.norm, 1e-6)


@dataclass
class Bench:
    """Measures with one number of threads."""

    config: ModelConfig
    device: Device
    ram: RamSlab
    pool: cpu.ThreadPool
    options: argparse.Namespace
    seed: int = 0

    def ids(self, token: int) -> npt.NDArray[np.int32]:
        """int32 [L, k]: the token's group of experts; experts are shuffled into new groups every GROUPS
        tokens.
        """
        layers, k = len(self.config.moe_layers), self.config.num_experts_per_tok
        rows = []
        for layer in range(layers):
            order = np.random.default_rng([self.seed, token // GROUPS, layer]).permutation(GROUPS * k)
            rows.append(order[token % GROUPS * k :][:k])
        return np.array(rows, np.int32)

    def program_and_host(self, uploads: int | None) -> tuple[Program, DecodeHost]:
        """Both sides of a decode step. `uploads`: a fixed number a layer; None: by live averages."""
        k = self.config.num_experts_per_tok
        reserve = k if uploads is None else uploads
        slots = reserve + 1 if reserve else 0
        program = Program(self.config, self.device, slots, self.ram.slab)
        residency = Residency(self.ram.n_keys, slots, reserve)
        host = DecodeHost(
            self.pool,
            residency,
            self.device.copier(),
            shape=(self.config.hidden_size, self.config.moe_intermediate_size),
            mailbox=program.box,
            ram=self.ram.slab,
            ram_rows=self.ram.rows,
            slab_address=program.slab.data_ptr(),
            slab_stride=program.slab.stride(0),
            n_experts=self.config.n_routed_experts,
            top_k=k,
            pcie_gbps=45.0,
            cpu_gbps=75.0,
        )
        return program, host

    def measure(self, uploads: int | None) -> dict[str, float]:
        """Serve tokens, and return their figures and the largest error."""
        program, host = self.program_and_host(uploads)
        walls, stats = [], []
        for token in range(self.options.tokens + 2):
            if uploads:
                host.pcie_gbps = 1e6  # so that all slots are used
            ids = self.ids(token)
            host.clear_flags()
            start = time.perf_counter()
            program.launch.start()
            host.serve_token(ids, 20.0)
            program.launch.finish()
            walls.append(time.perf_counter() - start)
            host.wait_for_copies()
            stats.append(host.stats)
        error = self.error(program, ids)
        return summary(walls[2:], np.concatenate(stats[2:]), self.config.expert_bytes) | {"error": error}

    def error(self, program: Program, ids: npt.NDArray[np.int32]) -> float:
        """Largest relative L2 distance of a layer's sum from the CPU kernel's."""
        errors = []
        for layer, chosen in enumerate(ids.tolist()):
            rows = self.ram.rows[[layer * self.config.n_routed_experts + i for i in chosen]]
            expected = torch.zeros(1, self.config.hidden_size)
            k = len(chosen)
            cpu.experts_forward(
                self.pool,
                [self.ram.expert(int(row)) for row in rows],
                torch.arange(k + 1, dtype=torch.int32),
                torch.zeros(k, dtype=torch.int32),
                program.weights.cpu(),
                program.hidden.cpu().unsqueeze(0),
                expected,
            )
            got = program.sums[layer].cpu()
            errors.append(float((got - expected[0]).norm() / expected.norm()))
        return max(errors)

    def ceilings(self) -> dict[str, float]:
        """GB/s of a read of RAM alone, of uploads alone, and of each with both at once."""
        rows = np.random.default_rng(self.seed).permutation(self.ram.n_rows)
        chosen = [self.ram.slab[row, : self.config.expert_bytes] for row in rows[: max(8, len(rows) // 2)]]
        slab = self.device.empty((8, self.ram.stride), torch.uint8)
        copier, nbytes = self.device.copier(), self.config.expert_bytes
        sources = [self.ram.slab[row].data_ptr() for row in rows[len(rows) // 2 :]]

        def queue(copies: int) -> None:
            for i in range(copies):
                copier.upload(slab[i % 8].data_ptr(), sources[i % len(sources)], nbytes)

        read = statistics.median(_kernels.read_bandwidth(self.pool, chosen) for _ in range(7))
        uploads = []
        for _ in range(5):
            start = time.perf_counter()
            queue(48)
            copier.synchronize()
            uploads.append(48 * nbytes / (time.perf_counter() - start) / 1e9)
        upload = statistics.median(uploads)
        # enough uploads to outlast the read: their rate during it follows from the total time
        copies = max(8, int(2 * len(chosen) * upload / read))
        reads, besides = [], []
        for _ in range(5):
            start = time.perf_counter()
            queue(copies)
            reads.append(_kernels.read_bandwidth(self.pool, chosen))
            read_s = len(chosen) * nbytes / reads[-1] / 1e9
            copier.synchronize()
            rest_s = time.perf_counter() - start - read_s
            besides.append((copies * nbytes / 1e9 - rest_s * upload) / read_s)
        return {
            "read_gbps": read,
            "upload_gbps": upload,
            "read_beside_gbps": statistics.median(reads),
            "upload_beside_gbps": statistics.median(besides),
        }


def summary(walls: list[float], stats: npt.NDArray[np.float64], nbytes: int) -> dict[str, float]:
    """Figures of tokens: `walls` seconds each, `stats` [tokens * L, fields]."""
    layers = len(stats) // len(walls)
    column = dict(zip(FIELDS, stats.T, strict=True))
    uploaded = column["uploads"] > 0
    column["over_pcie"] = column["uploads"] + column["part"]
    on_cpu = column["cpu"] > 0

    def rate(count: str, seconds: str, where: npt.NDArray[np.bool_]) -> float:
        return (
            float(np.median(column[count][where] * nbytes / column[seconds][where]) / 1e9)
            if where.any()
            else 0.0
        )

    figures = {
        "layer_ms": statistics.median(walls) / layers * 1e3,
        "layer_ms_best": min(walls) / layers * 1e3,
        "layer_ms_worst": max(walls) / layers * 1e3,
        "cpu_gbps": rate("cpu", "cpu_s", on_cpu),
        "pcie_gbps": rate("over_pcie", "upload_s", uploaded),
        "uploads": float(column["uploads"].mean()),
        "part": float(column["part"].mean()),
        "hits": float(column["hits"].mean()),
    }
    figures["total_gbps"] = 8 * nbytes / figures["layer_ms"] / 1e6
    for name in ("cpu_s", "upload_s", "layer_s", "wait_s"):
        figures[f"host_{name[:-2]}_ms"] = float(np.nanmedian(column[name])) * 1e3
    for name in ("listed_s", "schedule_s"):
        for percent in (50, 95):
            figures[f"{name[:-2]}_us_p{percent}"] = float(np.percentile(column[name], percent)) * 1e6
    return figures


def show(threads: int, mode: str, row: dict[str, float]) -> None:
    """Print one line for people."""
    print(
        f"{threads:3} threads, {mode:8} {row['layer_ms']:.3f} ms a layer (best {row['layer_ms_best']:.3f}), "
        f"CPU {row['cpu_gbps']:.1f}, PCIe {row['pcie_gbps']:.1f}, together {row['total_gbps']:.1f} GB/s, "
        f"{row['uploads']:.2f} uploads + {row['part']:.2f}; cpu {row['host_cpu_ms']:.3f}, "
        f"upload {row['host_upload_ms']:.3f}, wait {row['host_wait_ms']:.3f} ms; "
        f"listed {row['listed_us_p50']:.1f}, "
        f"schedule {row['schedule_us_p50']:.1f} us (95 %: {row['schedule_us_p95']:.1f}); "
        f"error {row['error']:.1e}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="14", help="numbers of threads, comma-separated (14)")
    parser.add_argument("--uploads", default="", help="fixed numbers of uploads a layer, besides the split")
    parser.add_argument("--layers", type=int, default=10, help="MoE layers of a token (10)")
    parser.add_argument("--tokens", type=int, default=20, help="tokens per mode (20)")
    parser.add_argument("--device", default="cuda", help="cuda, or stand-in to try the script (cuda)")
    parser.add_argument("--shape", default="kimi-k2", choices=["kimi-k2", "tiny"], help="(kimi-k2)")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    options.threads = [int(n) for n in options.threads.split(",")]
    options.uploads = [int(n) for n in options.uploads.split(",") if n]
    return options


def main() -> int:
    """Measure, print, and fail when a sum is wrong."""
    options = parse()
    torch.manual_seed(0)
    config = model(options)
    device = open_device(options.device)
    ram = RamSlab(config, device=device)
    ram.fill_synthetic()
    modes: list[tuple[str, int | None]] = [("cpu", 0), ("both", None)]
    modes += [(f"{n} up", n) for n in options.uploads]
    rows = []
    for threads in options.threads:
        bench = Bench(config, device, ram, cpu.ThreadPool(threads), options)
        ceilings = bench.ceilings()
        if not options.json:
            print(
                f"{threads:3} threads, " + ", ".join(f"{k} {v:.1f}" for k, v in ceilings.items()), flush=True
            )
        for mode, uploads in modes:
            row = bench.measure(uploads)
            rows.append({"threads": threads, "mode": mode, **row, **ceilings})
            if not options.json:
                show(threads, mode, row)
    print(json.dumps({"benchmark": "roads", "error_bar": ERROR_BAR, "rows": rows}))
    return 0 if max(row["error"] for row in rows) <= ERROR_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
