"""Compiles every operation's kernels for Hopper; run by `test_compile.py`, in a process of its own."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace

import torch

import helpers.triton.compile as compiler
from moebox.kernels.gpu.triton import attention, dense, experts, overlap, router, signals, split_expert

ORDER = re.compile(r"griddepcontrol\.wait|ld\.(?:global|volatile)|st\.global|atom")
SPEC = SimpleNamespace(
    num_experts_per_tok=6, n_group=2, topk_group=1, norm_topk_prob=True, routed_scaling_factor=2.5
)


def compile_all(capacity: int) -> None:
    """tiny-k2's shapes: 8 heads, rank 128, rope 32, nope 32, v 32, hidden 256, 64 experts."""
    ids, weights, flag = torch.zeros(6, dtype=torch.int32), torch.zeros(6), torch.zeros(16, dtype=torch.int32)
    hidden, x, bf16 = torch.zeros(256).bfloat16(), torch.zeros(256), torch.bfloat16
    position, rotations = torch.zeros(1, dtype=torch.int64), torch.zeros(2, capacity, 16)
    cache, kv_b = torch.zeros(capacity, 160, dtype=bf16), torch.zeros(8, 64, 128, dtype=bf16)
    signals.wait(flag)
    signals.post(ids, weights, hidden, ids, weights, hidden, flag)
    router.route(torch.zeros(3, 64), torch.zeros(64), SPEC)
    router.route_and_post(torch.zeros(64), torch.zeros(64), SPEC, hidden, ids, weights, hidden, flag)
    router.predict(torch.zeros(64), torch.zeros(64), SPEC, ids, flag)
    dense.combine_norm(x, [x, hidden, x, x], x, 1e-5)
    dense.gemv(hidden, torch.zeros(2000, 256, dtype=bf16))
    dense.silu_mul(hidden)
    query = attention.latents(
        torch.zeros(352, dtype=bf16), torch.zeros(192), x[:128], rotations, position, cache
    )
    assert query.shape == (192,)
    query = attention.absorb(torch.zeros(512, dtype=bf16), kv_b, rotations, position)
    attention.value_up(attention.mla_decode(query, cache, position, 0.1, 128), kv_b, 32)
    ram = torch.zeros(3, 28672, dtype=torch.uint8)
    split_expert.split_expert(ram, (256, 64), torch.zeros(4, dtype=torch.int32), torch.zeros(1), hidden, x)


if __name__ == "__main__":
    for module in (attention, dense, experts, router, signals, split_expert):
        module.launch_options = lambda: {"OVERLAP": True, "launch_pdl": True}
    assert not overlap.launch_options()["OVERLAP"]
    compile_all(64)
    json.dump({name: ORDER.findall(ptx) for name, ptx in compiler.compiled.items()}, sys.stdout)
