"""Speed of the CPU expert kernels, compared with the machine's limits.

    python benchmarks/cpu_experts.py --threads 1,2

Decode is one token through 8 experts of K2's shape (H 7168, I 2048), drawn at random from more experts than
the last-level cache holds. It gives GB/s of weights and scales, compared with the same threads only reading
other experts' bytes; the two are measured in turns. Prefill is 512 tokens over 64 experts, top 8. It gives
tokens/s, compared with a loop of torch bf16 matmuls over dequantized experts, and GFLOP/s, compared with the
peak of the unit in use. Errors are relative L2 against fp64, for every instruction set of this machine. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.experts import Routing, random_arrays, random_routing, relative_error
from moebox import _kernels
from moebox.config import GROUP_SIZE
from moebox.kernels import cpu

HIDDEN, INNER, TOP_K = 7168, 2048, 8
EXPERTS, PREFILL_TOKENS = 64, 512
FLOPS_PER_PAIR = 3 * 2 * HIDDEN * INNER
TORCH_EXPERTS = 8
"""Dequantized experts (88 MB each) that torch's loop uses in turn: more than the cache holds, too."""
TINY_SHAPES = ((32, 32), (96, 160), (224, 32), (64, 416))
ERROR_BAR = 5e-3


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Layer:
    """Experts of one layer, and calls on them."""

    def __init__(self) -> None:
        self.arrays = [random_arrays(HIDDEN, INNER) for _ in range(EXPERTS)]
        self.experts = [cpu.Expert(*arrays) for arrays in self.arrays]
        self.hidden = torch.randn(PREFILL_TOKENS, HIDDEN).bfloat16()

    def pick(self) -> list[int]:
        """Eight different experts."""
        return torch.randperm(EXPERTS)[:TOP_K].tolist()

    def forward(
        self, pool: cpu.ThreadPool, chosen: list[int], routing: Routing, n_tokens: int, isa: str
    ) -> None:
        """One call of the kernel."""
        hidden = self.hidden[:n_tokens]
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        experts = [self.experts[i] for i in chosen]
        cpu.experts_forward(pool, experts, routing.offsets, routing.tokens, routing.weights, hidden, out, isa)


def measure_decode(layer: Layer, pool: cpu.ThreadPool, isa: str, repeats: int) -> dict[str, float]:
    """GB/s of a layer's 8 experts for one token, and of a read alone, measured in turns."""
    routing = random_routing([1] * TOP_K, 1)
    n_bytes = TOP_K * layer.experts[0].nbytes
    ours, read = [], []
    for _ in range(repeats + 1):
        chosen, others = layer.pick(), layer.pick()
        read.append(_kernels.read_bandwidth(pool, [array for i in others for array in layer.arrays[i]]))
        ours.append(seconds(lambda chosen=chosen: layer.forward(pool, chosen, routing, 1, isa)))
    layer_s, read_gbps = statistics.median(ours[1:]), statistics.median(read[1:])
    gbps = n_bytes / layer_s / 1e9
    return {"layer_ms": layer_s * 1e3, "gbps": gbps, "read_gbps": read_gbps, "ratio": gbps / read_gbps}


class TorchLoop:
    """The way without a kernel: bf16 matmuls over experts that were dequantized before."""

    def __init__(self, layer: Layer) -> None:
        self.weights = [
            [dequantize_bf16(*arrays[i : i + 2]) for i in (0, 2, 4)]
            for arrays in layer.arrays[:TORCH_EXPERTS]
        ]
        self.hidden = layer.hidden

    def run(self, routing: Routing, experts: int) -> None:
        """Compute the part of a prefill that the first `experts` experts have."""
        out = torch.zeros(self.hidden.shape, dtype=torch.float32)
        bounds = routing.offsets.tolist()
        for i in range(experts):
            tokens = routing.tokens[bounds[i] : bounds[i + 1]].long()
            weights = routing.weights[bounds[i] : bounds[i + 1]].unsqueeze(1)
            gate, up, down = self.weights[i % TORCH_EXPERTS]
            x = self.hidden[tokens]
            y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            out.index_add_(0, tokens, y.float() * weights)


def dequantize_bf16(packed: Tensor, scale: Tensor) -> Tensor:
    """bf16 [out, in]."""
    nibbles = packed.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32)) & 15
    weights = (nibbles - 8).bfloat16().view(*scale.shape, GROUP_SIZE) * scale.unsqueeze(-1)
    return weights.flatten(1)


def measure_prefill(
    layer: Layer, loop: TorchLoop, pool: cpu.ThreadPool, isa: str, repeats: int, torch_experts: int
) -> dict[str, float]:
    """Tokens/s of 512 tokens over 64 experts: ours and torch's (timed on its first experts), in turns."""
    routing = prefill_routing()
    share = float(routing.offsets[torch_experts] / routing.offsets[-1])
    torch.set_num_threads(pool.threads)
    ours, theirs, peaks = [], [], []
    for _ in range(repeats + 1):
        ours.append(seconds(lambda: layer.forward(pool, list(range(EXPERTS)), routing, PREFILL_TOKENS, isa)))
        theirs.append(seconds(lambda: loop.run(routing, torch_experts)) / share)
        peaks.append(_kernels.peak_gflops(pool, isa))
    ours_s, torch_s = statistics.median(ours[1:]), statistics.median(theirs[1:])
    return {
        "prefill_ms": ours_s * 1e3,
        "tokens_per_s": PREFILL_TOKENS / ours_s,
        "torch_tokens_per_s": PREFILL_TOKENS / torch_s,
        "torch_ratio": torch_s / ours_s,
        "gflops": len(routing.tokens) * FLOPS_PER_PAIR / ours_s / 1e9,
        "peak_gflops": statistics.median(peaks),
    }


def prefill_routing() -> Routing:
    """Each token has 8 different experts, chosen at random."""
    chosen = torch.rand(PREFILL_TOKENS, EXPERTS).argsort(1)[:, :TOP_K].flatten()
    order = chosen.argsort(stable=True)
    offsets = torch.cat([torch.zeros(1), chosen.bincount(minlength=EXPERTS).cumsum(0)])
    return Routing(offsets.int(), (order // TOP_K).int(), torch.rand(len(order)))


def measure_errors(isa: str) -> dict[str, float]:
    """Largest relative L2 error with bf16 hidden states, at K2's shape and at tiny odd ones."""
    k2 = [random_arrays(HIDDEN, INNER)]
    errors = {}
    for n_tokens in (1, 16):
        routing = random_routing([n_tokens], n_tokens)
        hidden = torch.randn(n_tokens, HIDDEN).bfloat16()
        errors[f"k2_{n_tokens}"] = relative_error(k2, routing, hidden, isa)
    tiny = [
        tiny_error(hidden, inner, n, isa) for (hidden, inner), n in itertools.product(TINY_SHAPES, (1, 3, 19))
    ]
    return {**errors, "tiny": max(tiny)}


def tiny_error(hidden: int, inner: int, n_tokens: int, isa: str) -> float:
    """The error of three experts, one of them without tokens."""
    arrays = [random_arrays(hidden, inner) for _ in range(3)]
    routing = random_routing([n_tokens, 0, (n_tokens + 1) // 2], n_tokens)
    return relative_error(arrays, routing, torch.randn(n_tokens, hidden).bfloat16(), isa)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """A row of figures for each number of threads and instruction set."""
    layer = Layer()
    loop = None if options.no_prefill else TorchLoop(layer)
    errors = {isa: measure_errors(isa) for isa in options.isa}
    rows: list[dict[str, object]] = []
    for threads, isa in itertools.product(options.threads, options.isa):
        pool = cpu.ThreadPool(threads)
        row = {"threads": threads, "isa": isa, **measure_decode(layer, pool, isa, options.repeats)}
        if loop is not None and isa != "scalar":
            row |= measure_prefill(layer, loop, pool, isa, options.prefill_repeats, options.torch_experts)
        rows.append({**row, "errors": errors[isa]})
        if not options.json:
            show(rows[-1])
    return rows


def show(row: dict[str, object]) -> None:
    """Print one row as text."""
    print("{threads} threads, {isa}".format(**row))
    print(
        "  decode   {layer_ms:.2f} ms a layer, {gbps:.1f} GB/s, read {read_gbps:.1f}: {ratio:.0%}".format(
            **row
        )
    )
    if "gflops" in row:
        print(
            "  prefill  {tokens_per_s:.0f} tok/s, torch bf16 {torch_tokens_per_s:.0f}: {torch_ratio:.1f}x; "
            "{gflops:.0f} GFLOP/s of {peak_gflops:.0f}".format(**row)
        )
    print(
        "  error    " + ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items()), flush=True
    )


def parse() -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", default="1,2", help="numbers of threads, comma-separated (1,2)")
    parser.add_argument("--isa", default=",".join(cpu.isa_paths()), help="instruction sets (all usable here)")
    parser.add_argument("--repeats", type=int, default=15, help="decode measurements per row (15)")
    parser.add_argument("--prefill-repeats", type=int, default=3, help="prefill measurements per row (3)")
    parser.add_argument("--torch-experts", type=int, default=8, help="of 64 timed for torch's loop (8)")
    parser.add_argument("--no-prefill", action="store_true", help="decode and errors only")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    options.threads = [int(n) for n in options.threads.split(",")]
    options.isa = options.isa.split(",")
    return options


def main() -> int:
    """Measure, print, and fail when an error is over its bar."""
    options = parse()
    torch.manual_seed(0)
    rows = measure(options)
    print(json.dumps({"benchmark": "cpu_experts", "error_bar": ERROR_BAR, "rows": rows}))
    worst = max(error for row in rows for error in row["errors"].values())
    return 0 if worst <= ERROR_BAR else 1


if __name__ == "__main__":
    sys.exit(main())
