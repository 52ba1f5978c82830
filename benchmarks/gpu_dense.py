"""Speed of the dense part of a decode step on the GPU, compared with its memory's bandwidth.

    python benchmarks/gpu_dense.py

Shapes are K2's, for one token. `gemv` is every matrix of a layer, and the head: GB/s of weights, compared
with torch.mv and a device copy. It uses several matrices in turn, so that none is in the cache. `layer` is
the attention, norms, router and shared expert of a layer in a CUDA graph, as the decode step runs them, but
without routed experts and with all flags raised; with kernels that start before their predecessor's end, and
without. `mla_decode` is attention by length of the context. Times are medians over replays. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import eager_ms, graph_ms
from torch import Tensor

from moebox.kernels.gpu.triton import attention, dense, overlap, router, signals
from moebox.kernels.gpu.triton import ops as triton_ops

HIDDEN, QUERY, RANK, ROPE, HEADS, NOPE, V, INNER, EXPERTS, TOP_K = (
    7168,
    1536,
    512,
    64,
    64,
    128,
    128,
    2048,
    384,
    8,
)
LAYER_MATRICES = {
    "q_kv_a_proj": (QUERY + RANK + ROPE, HIDDEN),
    "q_b_proj": (HEADS * (NOPE + ROPE), QUERY),
    "o_proj": (HIDDEN, HEADS * V),
    "gate_up_proj": (2 * INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
MATRICES = LAYER_MATRICES | {"gate": (EXPERTS, HIDDEN), "lm_head": (163840, HIDDEN)}
LENGTHS = (17, 512, 4096, 32768, 100_000)
BEYOND_CACHE_BYTES = 400 << 20


@dataclass(frozen=True)
class Spec:
    """K2's router."""

    num_experts_per_tok: int = TOP_K
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.827


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A random tensor on the device, scaled so that products with its rows keep a vector's magnitude."""
    return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).type(dtype)


def copy_tbps() -> float:
    """TB/s of a device copy, read and written bytes. Not in a graph, which copies in another, slower way."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / eager_ms(lambda: target.copy_(source)) / 1e9


def measure_gemv(name: str) -> dict[str, float]:
    """Figures of one matrix, by `dense.gemv` and by torch."""
    n, k = MATRICES[name]
    dtype = torch.float32 if name == "gate" else torch.bfloat16
    nbytes = n * k * dtype.itemsize
    matrices = [random(n, k, dtype=dtype) for _ in range(BEYOND_CACHE_BYTES // nbytes + 1)]
    x = random(k)
    expected = matrices[0].double() @ x.double()
    error = float((dense.gemv(x, matrices[0], torch.float32) - expected).norm() / expected.norm())
    wide = x.type(dtype)
    ours = 1e3 * graph_ms([lambda w=w: dense.gemv(x, w) for w in matrices])
    theirs = 1e3 * graph_ms([lambda w=w: torch.mv(w, wide) for w in matrices])
    return {"us": ours, "tbps": nbytes / ours / 1e6, "torch_us": theirs, "error": error, "mb": nbytes / 1e6}


class Layer:
    """A layer's weights and mailbox."""

    def __init__(self, capacity: int) -> None:
        self.matrices = {name: random(*shape) for name, shape in LAYER_MATRICES.items()}
        self.gate = random(EXPERTS, HIDDEN, dtype=torch.float32)
        self.kv_b = random(HEADS, NOPE + V, RANK)
        self.norms = {width: torch.rand(width, device="cuda") for width in (HIDDEN, QUERY, RANK)}
        self.bias = torch.rand(EXPERTS, device="cuda")
        self.cache = random(capacity, RANK + ROPE)
        pinned: dict[str, Any] = {"pin_memory": True}
        self.ids, self.weights = torch.zeros(TOP_K, dtype=torch.int32, **pinned), torch.zeros(TOP_K, **pinned)
        self.hidden = torch.zeros(HIDDEN, dtype=torch.bfloat16, **pinned)
        self.flag = torch.ones(16, dtype=torch.int32, **pinned)
        self.sums = torch.zeros(HIDDEN, **pinned)
        self.uploaded = torch.ones(16, dtype=torch.int32, device="cuda")

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a token reads."""
        return sum(w.nbytes for w in (*self.matrices.values(), self.gate, self.kv_b))

    def run(self, x: Tensor, terms: list[Tensor], rotations: Tensor, position: Tensor) -> list[Tensor]:
        """Run the layer as `DecodeProgram` does, without routed experts."""
        ops, w = triton_ops, self.matrices
        y = ops.combine_norm(x, terms, self.norms[HIDDEN], 1e-6)
        both = ops.gemv(y, w["q_kv_a_proj"])
        q = ops.latents(both, self.norms[QUERY], self.norms[RANK], rotations, position, self.cache)
        q = ops.absorb(ops.gemv(q, w["q_b_proj"]), self.kv_b, rotations, position)
        values = ops.value_up(ops.mla_decode(q, self.cache, position, 0.13, RANK), self.kv_b, V)
        y = ops.combine_norm(x, [ops.gemv(values, w["o_proj"])], self.norms[HIDDEN], 1e-6)
        logits = ops.gemv(y, self.gate)
        ops.route_and_post(logits, self.bias, Spec(), y, self.ids, self.weights, self.hidden, self.flag)
        shared = ops.gemv(ops.silu_mul(ops.gemv(y, w["gate_up_proj"])), w["down_proj"])
        for flag in (self.flag, self.uploaded, self.flag):
            ops.wait(flag)
        return [shared, self.sums]


def measure_layer(capacity: int = 4096, layers: int = 8, length: int = 600) -> dict[str, float]:
    """Microseconds of a layer, with and without overlap of kernels, and its bytes."""
    stack = [Layer(capacity) for _ in range(layers)]
    x, position = random(HIDDEN, dtype=torch.float32), torch.tensor([length - 1], device="cuda")
    rotations = torch.randn(2, capacity, ROPE // 2, device="cuda")

    def run() -> None:
        terms: list[Tensor] = []
        for layer in stack:
            terms = layer.run(x, terms, rotations, position)

    results = {"mb": stack[0].nbytes / 1e6, "us": 1e3 * graph_ms([run]) / layers}
    for module in (attention, dense, router, signals):
        module.launch_options = lambda: {"OVERLAP": False, "launch_pdl": False}
    results["us_without_overlap"] = 1e3 * graph_ms([run]) / layers
    for module in (attention, dense, router, signals):
        module.launch_options = overlap.launch_options
    return results


def measure_attention(length: int) -> dict[str, float]:
    """Figures of `mla_decode` over `length` tokens, in a cache that holds no more."""
    q, cache = random(HEADS, RANK + ROPE), torch.randn(length, RANK + ROPE, device="cuda").bfloat16()
    position = torch.tensor([length - 1], device="cuda")
    seen = cache.double()
    expected = torch.softmax(q.double() @ seen.T * 0.13, dim=-1) @ seen[:, :RANK]
    out = attention.mla_decode(q, cache, position, 0.13, RANK)
    us = 1e3 * graph_ms([lambda: attention.mla_decode(q, cache, position, 0.13, RANK)] * 4)
    error = float((out - expected).norm() / expected.norm())
    return {"us": us, "tbps": cache.nbytes / us / 1e6, "error": error}


def main() -> int:
    """Measure, print a table, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 1
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy_tbps": copy_tbps()}
    print(f"{results['device']}: copy {results['copy_tbps']:.2f} TB/s")
    results["gemv"] = {name: measure_gemv(name) for name in MATRICES}
    for name, row in results["gemv"].items():
        print(
            f"gemv {name:12} {row['mb']:7.1f} MB {row['us']:6.1f} us {row['tbps']:.2f} TB/s "
            f"(torch.mv {row['torch_us']:.1f} us), error {row['error']:.0e}"
        )
    results["layer"] = measure_layer()
    layer = results["layer"]
    print(
        f"layer {layer['mb']:.0f} MB: {layer['us']:.1f} us, "
        f"{layer['us_without_overlap']:.1f} without overlap, "
        f"{layer['mb'] / results['copy_tbps']:.1f} at the rate of a copy"
    )
    results["mla_decode"] = {str(length): measure_attention(length) for length in LENGTHS}
    for length, row in results["mla_decode"].items():
        print(
            f"mla_decode {length:>6} tokens {row['us']:6.1f} us {row['tbps']:.2f} TB/s, "
            f"error {row['error']:.0e}"
        )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
