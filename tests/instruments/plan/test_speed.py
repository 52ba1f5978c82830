"""Predicted speeds: the floor of `offload/machine/floor.py`, and the losses."""

from dataclasses import replace

import pytest

from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan.gpus import find_preset
from moebox.instruments.plan.speed import CPU_BOX, H200_BOX, Efficiency, PickShares, SpeedModel
from moebox.offload.machine.floor import Ceilings

K2 = shape_config("kimi-k2")
PERFECT = Efficiency("", 1, 1, 1, 1, 1, 0, 0, 0, ((512, 1.0), (4096, 1.0)))
CPU = Ceilings(ram_gbps=100, nvme_gbps=5, cpu_tflops=5)
GPU = find_preset("h200-141gb").ceilings(132, 5.4, 7)


@pytest.mark.parametrize(
    ("ram_gbps", "hits", "measured_ms", "floor_ms"),
    [(178.5, 0.559, 45.9, 28.98), (146.5, 0.702, 33.5, 24.56)],
)
def test_tokens_on_the_h200_box_are_predicted_as_measured(ram_gbps, hits, measured_ms, floor_ms):
    """Rows of docs/benchmarks.md, "Decoding, 8 MoE layers", at 60 layers."""
    speeds = SpeedModel(K2, replace(GPU, ram_gbps=ram_gbps), H200_BOX)

    token = speeds.decode(PickShares(hits, 1 - hits, 0))

    assert token.floor.seconds * 1e3 == pytest.approx(floor_ms, rel=0.01)
    assert token.seconds * 1e3 == pytest.approx(measured_ms, rel=0.1)


@pytest.mark.parametrize(("tokens", "measured_ms"), [(512, 77.5), (4096, 134)])
def test_prompts_on_the_h200_box_are_predicted_as_measured(tokens, measured_ms):
    from moebox.instruments.plan.hits import published_hit_predictor

    counts = published_hit_predictor(K2).expert_counts(tokens)
    prompt = SpeedModel(K2, GPU, H200_BOX).prefill(counts, tokens, 0, 0)

    assert prompt.seconds / 60 * 1e3 == pytest.approx(measured_ms, rel=0.1)


def test_without_losses_a_token_takes_its_floor():
    token = SpeedModel(K2, CPU, PERFECT).decode(PickShares(0, 1, 0), 1000)

    assert token.seconds == pytest.approx(token.floor.seconds)
    assert token.of_floor == pytest.approx(1)


def test_with_a_slow_disk_a_token_takes_the_disks_time():
    slow = SpeedModel(K2, replace(CPU, nvme_gbps=0.1), PERFECT)

    token = slow.decode(PickShares(0, 0, 1))

    assert token.floor.seconds == pytest.approx(token.floor.nvme_s)
    assert token.floor.nvme_s < token.seconds < 1.05 * token.floor.nvme_s


def test_cold_experts_are_read_and_computed():
    """The last cold expert of a layer is computed after its read, the others while the disk is read."""
    token = SpeedModel(K2, CPU, PERFECT).decode(PickShares(0, 0, 1))

    read_s = 480 * K2.expert_bytes / 5e9
    last_s = 60 * K2.expert_bytes / 100e9
    assert token.experts_s == pytest.approx(read_s + last_s)


def test_latency_of_the_disk_counts_only_in_layers_that_read():
    late = SpeedModel(K2, CPU, replace(PERFECT, read_s=0.01))

    nothing, all_of_it = late.decode(PickShares(0, 1, 0)), late.decode(PickShares(0, 0, 1))

    perfect = SpeedModel(K2, CPU, PERFECT)
    assert nothing.seconds == perfect.decode(PickShares(0, 1, 0)).seconds
    more_s = all_of_it.seconds - perfect.decode(PickShares(0, 0, 1)).seconds
    assert more_s == pytest.approx(60 * 0.01)


def test_better_bandwidths_and_hits_make_a_token_faster():
    base = PickShares(0.3, 0.6, 0.1)
    before = SpeedModel(K2, GPU, H200_BOX).decode(base, 4096).seconds
    faster = {"ram_gbps": 264, "nvme_gbps": 14, "pcie_gbps": 110}

    for name, value in faster.items():
        ceilings = replace(GPU, **{name: value})
        assert SpeedModel(K2, ceilings, H200_BOX).decode(base, 4096).seconds <= before
    for chances in (PickShares(0.4, 0.5, 0.1), PickShares(0.3, 0.65, 0.05)):
        assert SpeedModel(K2, GPU, H200_BOX).decode(chances, 4096).seconds < before


def test_attention_over_a_long_context_takes_its_bytes():
    speeds = SpeedModel(K2, GPU, H200_BOX)
    short, long = (speeds.decode(PickShares(1, 0, 0), tokens) for tokens in (0, 100_000))

    assert long.cache_bytes == 100_000 * 61 * 576 * 2
    measured_s = 61 * 76e-6  # docs/benchmarks.md: a layer's attention over 100,000 tokens
    assert long.seconds - short.seconds == pytest.approx(measured_s, rel=0.05)


def test_experts_on_the_disk_make_a_prompt_wait_for_the_disk():
    speeds = SpeedModel(K2, GPU, H200_BOX)
    counts = [10] * 384

    near, half = (speeds.prefill(counts, 480, 0.0, share) for share in (0.0, 0.5))

    assert near.layer_disk_s == 0
    assert half.layer_disk_s == pytest.approx(192 * K2.expert_bytes / 7e9)
    assert half.seconds > near.seconds


def test_efficiency_survives_the_profile():
    assert Efficiency.from_figures(CPU_BOX.figures(), CPU_BOX.source) == CPU_BOX
    assert Efficiency.from_figures({"backbone": 0.5}, "") is None


def test_shares_of_the_prefill_floor_are_interpolated():
    shares = [H200_BOX.of_prefill_floor(tokens) for tokens in (64, 512, 1448, 4096, 8192)]

    assert shares[0] == shares[1] < shares[2] < shares[3] == shares[4]
    assert shares[2] == pytest.approx((shares[1] + shares[3]) / 2, abs=0.01)
