"""Speed of the GPU expert kernels, compared with the GPU's limits.

    python benchmarks/gpu_experts.py

Experts have K2's shape (H 7168, I 2048). `one` is a token through 1 to 8 resident experts, which are drawn at
random from 64 (1.6 GB, more than the cache holds), with lists in pinned memory, in a CUDA graph. It gives
GB/s of weights and scales, compared with a device copy's bytes read and written. `many` is tokens over 64
experts, top 8. It gives TFLOP/s, compared with a bf16 product of 8192^3 matrices, and GB/s of weights. The
limits are measured in the same run, on random data. Times are medians. Errors are relative L2 against fp64.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from gpu_timing import eager_ms, graph_ms
from torch import Tensor

from moebox.config import GROUP_SIZE
from moebox.kernels.gpu.slots import SlotLayout, slot_layout
from moebox.kernels.gpu.triton import experts

HIDDEN, INNER, TOP_K, EXPERTS = 7168, 2048, 8, 64
FLOPS_PER_PAIR = 3 * 2 * HIDDEN * INNER
BARS = {"one_of_copy": 0.55, "many_of_matmul": 0.35, "error": 5e-3}


def ceilings() -> dict[str, float]:
    """GB/s of a device copy (read and written), TFLOP/s of a bf16 product."""
    source = torch.empty(4 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_ms = eager_ms(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    product_ms = eager_ms(lambda: a @ b)
    return {"copy_gbps": 2 * source.nbytes / copy_ms / 1e6, "matmul_tflops": 2 * 8192**3 / product_ms / 1e9}


def random_slab(layout: SlotLayout, slots: int = EXPERTS) -> Tensor:
    """Random experts. Scales have both signs and keep outputs near 1."""
    slab = torch.empty(slots, -(-layout.nbytes // 4096) * 4096, dtype=torch.uint8, device="cuda").random_()
    for start, columns in (
        (layout.gate_scale, HIDDEN),
        (layout.up_scale, HIDDEN),
        (layout.down_scale, INNER),
    ):
        n = HIDDEN * INNER // GROUP_SIZE
        scale = (0.05 + 0.35 * torch.rand(slots, n, device="cuda")) / columns**0.5
        signs = torch.randint(0, 2, (slots, n), device="cuda") * 2 - 1
        slab[:, start : start + 2 * n] = (scale * signs).bfloat16().view(torch.uint8)
    return slab


class Case(NamedTuple):
    """A call that returns its output, and the fp64 of the output's first rows."""

    call: Callable[[], Tensor]
    reference: Callable[[], Tensor]

    def error(self) -> float:
        """Relative L2."""
        expected, out = self.reference(), self.call()
        out = out[: len(expected)].double()
        return float((out - expected).norm() / expected.norm())


class Layer:
    """64 experts on the device, and calls on them."""

    def __init__(self) -> None:
        self.layout = slot_layout((HIDDEN, INNER))
        self.slab = random_slab(self.layout)
        self.weights = torch.rand(TOP_K).pin_memory()

    def one(self, count: int) -> Case:
        """A token through `count` random experts."""
        listed = torch.tensor([count, *torch.randperm(EXPERTS)[:TOP_K].tolist()], dtype=torch.int32)
        listed, hidden = listed.pin_memory(), torch.randn(HIDDEN, device="cuda").bfloat16()
        out = torch.empty(HIDDEN, device="cuda")

        def call() -> Tensor:
            experts.experts_one(self.slab, (HIDDEN, INNER), listed, self.weights, hidden, out)
            return out

        return Case(call, lambda: self.reference(listed[1 : 1 + count], self.weights[:count], hidden))

    def many(self, n_tokens: int) -> Case:
        """Tokens through 8 random experts each."""
        ids = torch.rand(n_tokens, EXPERTS).topk(TOP_K).indices
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
        order = ids.flatten().sort(stable=True).indices
        tokens = (order // TOP_K).int().cuda()
        offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int().cuda()
        weights, slots = torch.rand(len(tokens), device="cuda"), torch.randperm(EXPERTS).int().cuda()
        hidden, out = torch.randn(n_tokens, HIDDEN, device="cuda").bfloat16(), torch.zeros(n_tokens, HIDDEN)
        out, counts = out.cuda(), counts.tolist()

        def call() -> Tensor:
            experts.experts_many(
                self.slab, (HIDDEN, INNER), slots, offsets, tokens, weights, hidden, out, counts
            )
            return out

        def reference() -> Tensor:
            rows = [self.of_token(t, slots, offsets, tokens, weights, hidden) for t in range(4)]
            out.zero_()
            return torch.stack(rows)

        return Case(call, reference)

    def of_token(self, token: int, slots: Tensor, offsets: Tensor, tokens: Tensor, *rest: Tensor) -> Tensor:
        """The output of one token of `many`, in fp64."""
        weights, hidden = rest
        pairs = (tokens == token).nonzero().flatten()
        chosen = slots[torch.searchsorted(offsets, pairs, right=True, out_int32=True) - 1]
        return self.reference(chosen, weights[pairs], hidden[token])

    def reference(self, slots: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """The output of one token, fp64 [H]."""
        x, total = hidden.double(), torch.zeros(HIDDEN, dtype=torch.float64, device="cuda")
        for slot, weight in zip(slots.tolist(), weights.tolist(), strict=True):
            gate = self.matrix(slot, self.layout.gate, self.layout.gate_scale, HIDDEN) @ x
            up = self.matrix(slot, self.layout.up, self.layout.up_scale, HIDDEN) @ x
            inner = torch.nn.functional.silu(gate) * up
            total += weight * (self.matrix(slot, self.layout.down, self.layout.down_scale, INNER) @ inner)
        return total

    def matrix(self, slot: int, packed: int, scale: int, columns: int) -> Tensor:
        """Dequantized fp64 [out, in]."""
        n = HIDDEN * INNER
        data = self.slab[slot, packed : packed + n // 2]
        values = torch.stack((data & 15, data >> 4), -1).double() - 8
        scales = self.slab[slot, scale : scale + n // GROUP_SIZE * 2].view(torch.bfloat16).double()
        return (values.view(-1, GROUP_SIZE) * scales[:, None]).view(-1, columns)


def measure_one(layer: Layer, ceiling: dict[str, float], counts: list[int]) -> list[dict[str, float]]:
    """A row for each number of experts."""
    rows = []
    for count in counts:
        cases = [layer.one(count) for _ in range(20)]
        ms, n_bytes = graph_ms([case.call for case in cases]), count * layer.layout.nbytes
        rows.append(
            {
                "experts": count,
                "us": ms * 1e3,
                "gbps": n_bytes / ms / 1e6,
                "of_copy": n_bytes / ms / 1e6 / ceiling["copy_gbps"],
                "error": cases[0].error(),
            }
        )
    return rows


def measure_many(layer: Layer, ceiling: dict[str, float], tokens: list[int]) -> list[dict[str, float]]:
    """A row for each number of tokens."""
    rows = []
    for n_tokens in tokens:
        case = layer.many(n_tokens)
        ms = graph_ms([case.call] * 3)
        tflops = n_tokens * TOP_K * FLOPS_PER_PAIR / ms / 1e9
        rows.append(
            {
                "tokens": n_tokens,
                "ms": ms,
                "tflops": tflops,
                "of_matmul": tflops / ceiling["matmul_tflops"],
                "weights_gbps": EXPERTS * layer.layout.nbytes / ms / 1e6,
                "error": case.error(),
            }
        )
    return rows


def passes(one: list[dict[str, float]], many: list[dict[str, float]]) -> bool:
    """Whether 8 experts of one token, 512 tokens, and every error are within their bars."""
    return (
        all(row["of_copy"] >= BARS["one_of_copy"] for row in one if row["experts"] == TOP_K)
        and all(row["of_matmul"] >= BARS["many_of_matmul"] for row in many if row["tokens"] == 512)
        and all(row["error"] <= BARS["error"] for row in one + many)
    )


def main() -> int:
    """Measure, print, and fail when a bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="1,2,3,4,8", help="experts of one token (1,2,3,4,8)")
    parser.add_argument("--tokens", default="16,128,512,2048", help="of 64 experts (16,128,512,2048)")
    options = parser.parse_args()
    torch.manual_seed(0)
    ceiling, layer = ceilings(), Layer()
    one = measure_one(layer, ceiling, [int(n) for n in options.experts.split(",")])
    many = measure_many(layer, ceiling, [int(n) for n in options.tokens.split(",")])
    print("copy {copy_gbps:.0f} GB/s, bf16 product {matmul_tflops:.0f} TFLOP/s".format(**ceiling))
    for row in one:
        print(
            "one   {experts} experts {us:7.1f} us, {gbps:5.0f} GB/s: {of_copy:.0%}; error {error:.1e}".format(
                **row
            )
        )
    for row in many:
        print(
            "many  {tokens:4d} tokens {ms:7.3f} ms, {tflops:4.0f} TFLOP/s: {of_matmul:.0%}; "
            "{weights_gbps:.0f} GB/s of weights; error {error:.1e}".format(**row)
        )
    result = {"benchmark": "gpu_experts", "bars": BARS, "gpu": torch.cuda.get_device_name(), **ceiling}
    print(json.dumps(result | {"one": one, "many": many}))
    return 0 if passes(one, many) else 1


if __name__ == "__main__":
    sys.exit(main())
