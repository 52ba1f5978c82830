"""What a benchmark runs: budgets scaled with the depth, random models, threads."""

import math

import pytest
import torch

from moebox.errors import PlanError
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.target import make_pool, scale_budgets
from moebox.instruments.measure.random_model import experts_in_ram, shape_config, synthetic_model
from moebox.kernels import cpu
from moebox.offload.memory.ram_slab import RamSlab

K2, K2_SHALLOW = shape_config("kimi-k2"), shape_config("kimi-k2", 9)
GIB = 1 << 30


def budgets_of(options, free_vram=139 * GIB, free_ram=120 * GIB):
    return scale_budgets(K2_SHALLOW, K2, options, free_vram, free_ram)


def test_budget_of_an_80_gb_card_is_scaled_to_the_depth():
    budgets = budgets_of(BenchOptions(vram=80_000_000_000, context=8192))

    assert 0.07 < budgets.full_slots / 23040 < 0.12
    assert budgets.slots - 8 == math.ceil((budgets.full_slots - 8) * 8 / 60)  # 8 for uploads
    assert (budgets.rows, budgets.exclusive) == (3072, False)
    assert "8 of 60 MoE layers" in budgets.lines[-1]
    assert f"{budgets.full_slots - 8:,} of 23,040 experts" in budgets.lines[1]


def test_budget_may_exceed_the_memory_of_the_card():
    small = budgets_of(BenchOptions(vram=80_000_000_000, context=8192), free_vram=40 * GIB)

    assert small == budgets_of(BenchOptions(vram=80_000_000_000, context=8192))


def test_budget_of_zero_keeps_no_expert_on_the_gpu():
    assert budgets_of(BenchOptions(vram=0)).slots == 0


def test_ram_too_small_for_all_experts_makes_the_tiers_exclusive():
    budgets = budgets_of(BenchOptions(vram=130 * GIB, ram=500 * GIB, context=4096))

    assert budgets.exclusive
    assert budgets.rows < 3072 < budgets.rows + budgets.slots


def test_run_that_does_not_fit_the_machine_is_refused():
    with pytest.raises(PlanError, match=r"3,072 experts take 70\.\d GiB of RAM, 57\.0 GiB are free"):
        budgets_of(BenchOptions(), free_ram=60 * GIB)


def test_budgets_that_do_not_hold_all_random_experts_are_refused_before_memory_is_taken():
    with pytest.raises(PlanError, match=r"hold [\d,]+ of 3,072 random experts.*\n.*moebox synth"):
        budgets_of(BenchOptions(vram=80 * GIB, ram=300 * GIB, context=4096))


def test_whole_model_that_does_not_fit_the_budget_is_refused():
    with pytest.raises(PlanError, match="before the first expert"):
        budgets_of(BenchOptions(vram=10 * GIB))


def test_synthetic_model_has_the_shapes_of_a_loaded_one_and_repeats_by_seed():
    config = shape_config("tiny")
    one, again = (dict(synthetic_model(config, torch.bfloat16).named_parameters()) for _ in range(2))
    other = dict(synthetic_model(config, torch.bfloat16, seed=1).named_parameters())

    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["lm_head.weight"].dtype == torch.bfloat16
    assert one["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert one["model.norm.weight"].eq(1).all()
    assert one["model.layers.0.mlp.down_proj.weight"].float().std() == pytest.approx(224**-0.5, rel=0.1)


def test_experts_in_ram_are_the_rows_of_the_slab():
    config = shape_config("tiny")
    ram = RamSlab(config)
    ram.fill_synthetic(seed=3)
    pool = cpu.ThreadPool(1)
    hidden = torch.randn(1, config.hidden_size).bfloat16()
    ids, weights = torch.tensor([[5]]), torch.ones(1, 1)

    routed = experts_in_ram(ram, pool).forward(2, ids, weights, hidden)

    direct = torch.zeros(1, config.hidden_size)
    expert = ram.expert(int(ram.rows[config.n_routed_experts + 5]))
    offsets, tokens = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cpu.experts_forward(pool, [expert], offsets, tokens, torch.ones(1), hidden, direct)
    assert torch.equal(routed, direct)


def test_threads_leave_a_core_to_feed_the_gpu():
    cores = cpu.allowed_cpus()

    assert make_pool(BenchOptions(), None).threads == cores
    assert make_pool(BenchOptions(threads=1), None).threads == 1
    assert make_pool(BenchOptions(), object()).threads == max(1, cores - 1)
