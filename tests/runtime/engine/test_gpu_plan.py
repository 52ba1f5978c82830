"""The plan of VRAM and RAM: the experts' share, and refusals with the numbers."""

from dataclasses import replace
from pathlib import Path

import pytest

from moebox.config import parse_config
from moebox.errors import PlanError
from moebox.offload.memory.gpu_slab import RING_SLOTS
from moebox.offload.memory.ram_slab import row_stride
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import synthetic_trace
from moebox.quantize.synth.shapes import synth_config
from moebox.runtime.engine.gpu_plan import (
    CHUNK_TOKENS,
    RESERVE_BYTES,
    SMALLEST_CHUNK_TOKENS,
    GpuPlan,
    least_vram_bytes,
    plan_gpu_memory,
    workspace_bytes,
)
from moebox.runtime.engine.plan_parts import learned_bytes

GIB = 1 << 30
K2 = parse_config(synth_config("kimi-k2", format="int4"))
TINY = parse_config(synth_config("tiny", format="int4"))


def plan(config=K2, *, vram=None, free_vram=80 * GIB, ram=None, free_ram=700 * GIB, context=None) -> GpuPlan:
    return plan_gpu_memory(
        config, vram=vram, free_vram=free_vram, ram=ram, free_ram=free_ram, context=context
    )


def test_an_80_gb_card():
    made = plan(context=32768)
    assert made.backbone_bytes == pytest.approx(23e9, rel=0.05)
    assert made.kv_bytes == 32768 * (61 * 576 * 2 + 256)
    assert made.chunk_tokens == CHUNK_TOKENS
    assert made.fixed_bytes + made.slots * row_stride(K2) <= 80 * GIB
    assert made.fixed_bytes + (made.slots + 1) * row_stride(K2) > 80 * GIB
    assert 0.07 < made.slots / K2.n_keys < 0.1
    assert (made.ram_rows, made.exclusive) == (K2.n_keys, False)


def test_context_is_limited_where_none_is_asked_for():
    made = plan(free_vram=40 * GIB)
    left = 40 * GIB - made.backbone_bytes - RESERVE_BYTES
    assert 0.14 * left < made.kv_bytes <= 0.15 * left
    assert plan(free_vram=400 * GIB).context == K2.max_position_embeddings


def test_chunks_shrink_with_the_room():
    sizes = [plan(free_vram=size * GIB, context=8192).chunk_tokens for size in (27, 32, 40, 80)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == CHUNK_TOKENS
    assert plan(TINY, free_vram=80 * GIB, context=200).chunk_tokens == SMALLEST_CHUNK_TOKENS


def test_workspace_grows_with_chunk_and_context():
    assert workspace_bytes(K2, 8192, 8192) < 4 * GIB
    assert workspace_bytes(K2, 512, 8192) < workspace_bytes(K2, 1024, 8192)
    assert workspace_bytes(TINY, 256, 100) < workspace_bytes(TINY, 256, 1000)


def test_budget_below_what_is_free():
    wanted = least_vram_bytes(TINY, 100) + 5 * row_stride(TINY)
    made = plan(TINY, vram=wanted, context=100)
    assert made.slots == 5
    assert made.staging_bytes == RING_SLOTS * row_stride(TINY)


def test_all_experts_fit_the_gpu():
    assert plan(TINY, context=100).slots == TINY.n_keys + TINY.num_experts_per_tok


def test_ram_and_vram_hold_the_model_together():
    made = plan(TINY, ram=5 * row_stride(TINY) + learned_bytes(TINY, 1), context=100)
    assert made.exclusive
    assert made.ram_rows == 5
    assert made.slots == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram": 81 * GIB}, r"VRAM budget of 81.0 GiB, but only 80.0 GiB are free"),
        ({"ram": 701 * GIB}, r"RAM budget of 701.0 GiB, but only 700.0 GiB"),
        (
            {"free_vram": 20 * GIB, "context": 4096},
            r"needs 2\d\.\d GiB before the first expert .*free are 20",
        ),
        ({"vram": 20 * GIB, "context": 4096}, r"the VRAM budget is 20"),
        (
            {"ram": GIB // 2, "context": 4096},
            r"RAM holds 212\.6 MiB of experts beside .* room for 24 is needed, 567\.0 MiB: 354\.4 MiB are",
        ),
        ({"context": 1 << 20}, r"context of 1048576 tokens"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(PlanError, match=message):
        plan(**options)


def test_missing_bytes_add_up():
    """A budget that is larger by the missing bytes fits."""
    vram, row = least_vram_bytes(TINY, 100), row_stride(TINY)
    least, learned = 3 * TINY.num_experts_per_tok, learned_bytes(TINY, 2)
    with pytest.raises(PlanError) as raised:
        plan(TINY, vram=vram, ram=(least - 2) * row + learned, context=100)
    assert f"{2 * row / 2**20:.1f} MiB are missing" in str(raised.value)
    assert plan(TINY, vram=vram, ram=least * row + learned, context=100).cold


def test_experts_that_fit_neither_are_read_from_disk():
    """RAM keeps some rows free for the reads."""
    made = plan(ram=300 * GIB, context=4096)
    spare = K2.num_experts_per_tok + 16
    assert made.exclusive
    assert made.ram_rows == (300 * GIB - made.learned_bytes) // row_stride(K2)
    assert made.cold == K2.n_keys - (made.ram_rows - spare) - (made.slots - K2.num_experts_per_tok)
    assert (made.hot, made.warm) == (made.slots - K2.num_experts_per_tok, made.ram_rows - spare)
    together = plan(ram=530 * GIB, context=4096)
    assert (together.exclusive, together.cold) == (True, 0)
    assert together.hot + together.warm == K2.n_keys


def test_what_is_learned_of_the_router_is_planned():
    """Value model: 3 fp32 tables of 60 x 384 x 384; statistics: 2 of 59 x 384 x 384 and recent picks."""
    assert learned_bytes(K2, 0) == 2 * (4 * 59 * 384**2 + 16 * 60 * 384 + 2 * 4096 * 60 * 8)
    assert learned_bytes(K2, 1) - learned_bytes(K2, 0) == 3 * 4 * 60 * 384**2
    assert plan(context=4096).learned_bytes == learned_bytes(K2, 1)
    assert plan(ram=300 * GIB, context=4096).learned_bytes == learned_bytes(K2, 2)


def test_statistics_take_the_planned_bytes():
    """The counts of a run and those of earlier runs are in memory at the same time."""
    shape = (12, 64, 8)
    config = replace(TINY, num_hidden_layers=13, n_routed_experts=64, num_experts_per_tok=8)
    statistics = RouterStatistics(ModelIdentity("a model", "digest", *shape), Path("unused"))
    ids = synthetic_trace(5000, *shape).ids
    statistics.add(ids, prefill=False)
    seen = statistics.counts()
    nbytes = sum(getattr(seen, name).nbytes for name in ("uses", "last_use", "pairs", "recent"))

    assert len(config.moe_layers) == 12
    assert learned_bytes(config, 0) == pytest.approx(2 * nbytes, rel=0.02)
