"""The floor's arithmetic, checked against round numbers and against all possible splits."""

import math
import random
from dataclasses import replace

import pytest

from moebox.config import parse_config
from moebox.offload.machine.floor import (
    Ceilings,
    DecodeBytes,
    backbone_bytes,
    decode_floor,
    expert_flops,
    layer_flops,
    prefill_floor,
)
from moebox.quantize.synth.shapes import KIMI_K2_CONFIG

BOX = Ceilings(ram_gbps=100, hbm_gbps=4000, hbm_copy_gbps=4000, pcie_gbps=50, cpu_tflops=4, gpu_tflops=800)
K2 = parse_config(KIMI_K2_CONFIG)


def test_decode_floor_is_bytes_over_bandwidth():
    moved = DecodeBytes(backbone=8e9, hits=4e9, ram_misses=6e9)

    floor = decode_floor(moved, BOX)

    assert (floor.backbone_s, floor.hits_s, floor.misses_s) == pytest.approx((2e-3, 1e-3, 40e-3))
    assert floor.seconds == pytest.approx(43e-3)
    assert floor.together_s == floor.seconds


def test_decode_floor_divides_by_each_road_alone_and_reports_both_together_beside_it():
    shared = replace(BOX, ram_beside_gbps=80, pcie_beside_gbps=40)

    floor = decode_floor(DecodeBytes(0, 0, 6e9), shared)

    assert floor.seconds == pytest.approx(40e-3)
    assert floor.together_s == pytest.approx(50e-3)


def test_decode_floor_without_gpu_reads_everything_from_ram():
    floor = decode_floor(DecodeBytes(1e9, 0, 2e9), Ceilings(ram_gbps=50))

    assert floor.seconds == pytest.approx(60e-3)


def test_decode_floor_is_no_faster_than_the_disk():
    moved = DecodeBytes(8e9, 4e9, 6e9, nvme_misses=1e9)

    assert decode_floor(moved, replace(BOX, nvme_gbps=5)).seconds == pytest.approx(0.2)
    assert decode_floor(moved, replace(BOX, nvme_gbps=100)).seconds == pytest.approx(43e-3)


def test_faster_of_two_hbm_figures_counts():
    assert replace(BOX, hbm_copy_gbps=4200).fast_gbps == 4200
    assert not Ceilings(ram_gbps=10).has_gpu


def test_scaled_bytes_scale_every_part():
    assert DecodeBytes(1, 2, 3, 4).scaled(2) == DecodeBytes(2, 4, 6, 8)


def test_k2_backbone_and_experts_have_known_bytes():
    backbone = backbone_bytes(K2)

    assert backbone.token(60) == pytest.approx(21.1e9, rel=0.03)  # 23 GB with the embedding
    assert backbone.moe_layer == pytest.approx(2 * (101.12e6 + 44.04e6) + 4 * 384 * 7169, rel=1e-3)
    assert backbone.dense_layers == pytest.approx(2 * (101.12e6 + 3 * 7168 * 18432), rel=1e-3)
    assert backbone.head == 2 * 163840 * 7168 + 4 * 7168
    assert expert_flops(K2) == 2 * 44_040_192


def test_backbone_bytes_add_up_to_all_tensors_but_the_embedding():
    dense_first = replace(K2, num_hidden_layers=4, first_k_dense_replace=2, prefix="language_model.")
    total = sum(
        math.prod(shape) * (4 if "norm" in name or ".gate." in name else 2)
        for name, shape in dense_first.backbone_shapes().items()
        if "embed_tokens" not in name
    )

    assert backbone_bytes(dense_first).token(2) == total
    assert backbone_bytes(replace(K2, first_k_dense_replace=0)).dense_layers == 0


def test_prefill_with_equal_experts_shares_them_by_bandwidth():
    floor = prefill_floor([1] * 30, 1_000_000, 0, 0, BOX)

    assert floor.moving_s == pytest.approx(30e6 / 150e9)
    assert floor.cpu_experts == pytest.approx(20)


def test_prefill_gives_experts_with_many_tokens_to_the_gpu():
    """The CPU takes 10 microseconds for 1 token and 1000 for the busy expert, an upload 20."""
    busy, flops = 4000, 1e6

    floor = prefill_floor([busy, 1, 1], 1_000_000, flops, 0, BOX)

    assert floor.moving_s == pytest.approx(20e-6)
    assert floor.cpu_experts == pytest.approx(2)
    assert floor.computing_s == pytest.approx(busy * flops / 800e12)


def test_prefill_is_bound_by_computing_where_that_takes_longer():
    floor = prefill_floor([8] * 10, 1_000_000, 1e6, other_flops=800e12, ceilings=BOX)

    assert floor.seconds == floor.computing_s == pytest.approx(1.0, rel=1e-3)


def test_prefill_with_everything_resident_only_computes():
    floor = prefill_floor([], 1_000_000, 1e6, other_flops=8e12, ceilings=BOX)

    assert (floor.moving_s, floor.cpu_experts) == (0, 0)
    assert floor.seconds == pytest.approx(10e-3)


def test_prefill_without_gpu_sums_the_cpus_work():
    cpu = Ceilings(ram_gbps=100, cpu_tflops=1)

    floor = prefill_floor([1, 1000], 1_000_000, 1e6, other_flops=1e12, ceilings=cpu)

    assert floor.seconds == pytest.approx(10e-6 + 1e-3 + 1.0)
    assert floor.cpu_experts == 2


@pytest.mark.parametrize("seed", range(20))
def test_prefill_split_is_the_best_of_all_splits(seed):
    rng = random.Random(seed)
    counts = [int(rng.paretovariate(0.7)) for _ in range(rng.randint(1, 40))]
    expert_bytes, flops = 1_000_000, rng.choice([0, 1e6, 1e7])

    floor = prefill_floor(counts, expert_bytes, flops, 0, BOX)

    cpu_s = [max(expert_bytes / 100e9, count * flops / 4e12) for count in sorted(counts)]
    whole = min(
        max(sum(cpu_s[:taken]), (len(counts) - taken) * expert_bytes / 50e9)
        for taken in range(len(counts) + 1)
    )
    assert floor.moving_s <= whole * (1 + 1e-9)
    largest = max(expert_bytes / 50e9, cpu_s[min(int(floor.cpu_experts), len(cpu_s) - 1)])
    assert floor.moving_s >= whole - largest
    taken, part = int(floor.cpu_experts), floor.cpu_experts % 1
    on_cpu = sum(cpu_s[:taken]) + (part * cpu_s[taken] if part else 0)
    on_pcie = (len(counts) - floor.cpu_experts) * expert_bytes / 50e9
    assert floor.moving_s == pytest.approx(max(on_cpu, on_pcie))


def test_layer_flops_count_matrices_and_attended_pairs():
    one = layer_flops(K2, 1)

    assert one == 2 * (101_122_048 + 44_040_192 + 384 * 7168 + 64 * 320)
    assert layer_flops(K2, 2) - 2 * one == 2 * 64 * 320  # the second token sees the first
    assert layer_flops(K2, 1, cached=9) - one == 9 * 2 * 64 * 320
