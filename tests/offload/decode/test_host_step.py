"""The host's side of a decode step; a Python thread plays the GPU, and the copier has random delays."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from helpers.offload.decode_rig import Gpu, Rig, Spec, play_token, random_ids
from moebox.errors import DeviceError
from moebox.kernels import cpu
from moebox.offload.decode.host_step import FIELDS

PLACEMENTS = {
    "mixed": Spec(slots=12, reserve=3),
    "all on the CPU": Spec(slots=0, reserve=0),
    "all on the GPU": Spec(slots=34, reserve=4),
    "thrashing": Spec(slots=4, reserve=2),
    "one slot for transit": Spec(slots=2, reserve=1),
    "uploads only": Spec(slots=8, reserve=4, cpu_gbps=1e-3),
    "one layer, hits among the weakest": Spec(layers=1, slots=4, reserve=3, cpu_gbps=1.0),
    "split": Spec(inner=256, slots=12, reserve=3),
    "split, one slot for transit": Spec(inner=160, slots=2, reserve=1, cpu_gbps=20.0),
    "split, exclusive": Spec(inner=96, slots=12, reserve=3, rows=24),
    "exclusive, one layer": Spec(layers=1, n_experts=14, slots=8, reserve=3, rows=10, cpu_gbps=1.0),
    "exclusive": Spec(slots=12, reserve=3, rows=24),
    "exclusive, thrashing": Spec(slots=5, reserve=3, rows=30),
    "exclusive, without a spare row": Spec(slots=12, reserve=3, rows=21),
    "exclusive, full": Spec(slots=10, reserve=2, rows=20),
    "cold": Spec(slots=6, reserve=3, rows=16, spare=4),
    "cold, as few rows as will do": Spec(slots=4, reserve=2, rows=12, spare=4),
    "cold, no slots": Spec(slots=0, reserve=0, rows=14, spare=4),
    "cold, uploads only": Spec(slots=10, reserve=4, rows=14, spare=6, cpu_gbps=1e-3),
    "cold, split": Spec(inner=96, slots=6, reserve=2, rows=15, spare=4),
    "cold, one layer": Spec(layers=1, n_experts=24, slots=5, reserve=3, rows=12, spare=4, cpu_gbps=1.0),
}


def fields(rig: Rig) -> dict[str, np.ndarray]:
    """The last token's figures by name, each of all layers."""
    return dict(zip(FIELDS, rig.host.stats.T, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_expert_is_served_whatever_the_order_of_events(name: str, seed: int) -> None:
    """Slots hold the right bytes while the GPU may read them, sums are right, and no expert is lost."""
    spec = Spec(**{**vars(PLACEMENTS[name]), "seed": seed, "max_delay_us": (0, 30, 200, 500)[seed]})
    rig, generator = Rig(spec), np.random.default_rng(seed)
    if spec.max_delay_us and rig.cold is not None:
        rig.delay_reads(seed)
    for token in range(8):
        ids = random_ids(spec, generator)
        play_token(rig, ids, token, injected=bool(token % 2))
        assert (
            sum(fields(rig)[name] for name in ("hits", "uploads", "part", "cpu", "cold")) == spec.top_k
        ).all()
        if token == 4:
            rig.host.wait_for_copies()
            rig.check_places()
    rig.host.wait_for_copies()
    rig.check_places()
    assert rig.residency.tick == 8


def test_experts_that_are_used_stay_on_the_gpu() -> None:
    """The same experts at each token become hits, and the figures say so."""
    spec = Spec(slots=16, reserve=4, cpu_gbps=1.0)
    rig, ids = Rig(spec), random_ids(Spec(), np.random.default_rng(0))
    play_token(rig, ids, 0)
    stats = fields(rig)
    assert (stats["hits"] == 0).all()
    assert (stats["uploads"] + stats["part"] + stats["cpu"] == spec.top_k).all()
    for token in range(1, 6):
        play_token(rig, ids, token)
    stats = fields(rig)
    assert (stats["hits"] == spec.top_k).all()
    assert (stats["cpu_s"] == 0).all()
    assert (stats["layer_s"] >= stats["schedule_s"]).all()


@pytest.mark.parametrize("isa", cpu.isa_paths())
def test_an_expert_is_split_where_whole_ones_leave_a_road_idle(isa: str) -> None:
    """Three misses on two roads of the same speed: one is uploaded, one computed by the CPU, one split."""
    spec = Spec(layers=1, top_k=3, hidden=224, inner=256, slots=8, reserve=4, threads=3, isa=isa)
    rig = Rig(spec)
    seen = play_token(rig, random_ids(spec, np.random.default_rng(0)), 0).layers[0]
    stats = fields(rig)
    if isa == "scalar":  # its kernel computes whole experts only
        assert stats["part"] == 0
        assert stats["uploads"] + stats["cpu"] == 3
        return
    assert stats["uploads"] == 1
    assert 0.3 < stats["part"] < 0.6
    assert stats["cpu"] == 2 - stats["part"]
    assert seen.split[1] == 256 * stats["part"]


def test_a_pool_shares_the_work() -> None:
    """Experts large enough that the pool's threads take part."""
    spec = Spec(layers=2, n_experts=4, hidden=640, inner=320, slots=3, reserve=1, threads=3)
    rig, generator = Rig(spec), np.random.default_rng(1)
    for token in range(4):
        play_token(rig, random_ids(spec, generator), token)


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.isa_paths())
@pytest.mark.parametrize("shape", [(96, 160), (224, 32), (1024, 384)], ids=str)
@pytest.mark.parametrize("top_k", [1, 5])
def test_the_cpu_computes_the_same_bits_as_in_prefill(isa: str, shape: tuple[int, int], top_k: int) -> None:
    """The bits do not depend on the number of threads, nor on how the pool shares the work."""
    hidden, inner = shape
    spec = Spec(1, 6, top_k, hidden, inner, slots=0, reserve=0, threads=3, isa=isa)
    rig = Rig(spec)
    for token in range(3):
        ids = random_ids(spec, np.random.default_rng(token))
        seen = play_token(rig, ids, token).layers[0]
        expected = torch.zeros(1, hidden)
        cpu.experts_forward(
            rig.pool,
            [cpu.Expert(*rig.arrays[key]) for key in seen.ids],
            torch.arange(top_k + 1, dtype=torch.int32),
            torch.zeros(top_k, dtype=torch.int32),
            torch.tensor(seen.weights),
            seen.hidden.unsqueeze(0),
            expected,
            isa,
        )
        assert torch.equal(seen.total, expected[0])


def test_upload_times_are_known_by_the_next_token() -> None:
    """They are NaN until then. The live averages change with them."""
    spec = Spec(slots=12, reserve=4, cpu_gbps=1.0)
    rig, generator = Rig(spec), np.random.default_rng(2)
    play_token(rig, random_ids(spec, generator), 0)
    assert (fields(rig)["uploads"] > 0).any()
    rig.host.wait_for_copies()
    stats = fields(rig)
    assert (stats["upload_s"][stats["uploads"] > 0] > 0).all()
    assert rig.host.pcie_gbps != 50.0
    rig.host.pcie_gbps = 40.0
    assert rig.host.pcie_gbps == pytest.approx(40.0)


def test_exclusive_moves_experts_both_ways() -> None:
    """Experts that are used move to slots, and evicted ones back to RAM."""
    spec = Spec(slots=12, reserve=3, rows=24, cpu_gbps=5.0)
    rig, generator = Rig(spec), np.random.default_rng(3)
    before = set(np.flatnonzero(rig.residency.table() >= 0).tolist())
    for token in range(30):
        play_token(rig, random_ids(spec, generator), token)
    rig.host.wait_for_copies()
    rig.check_places()
    after = set(np.flatnonzero(rig.residency.table() >= 0).tolist())
    assert before - after
    assert after - before


def test_downloads_outlast_a_token() -> None:
    """Nothing else gets the rows of downloads that are still under way at the next token."""
    spec = Spec(1, 14, slots=8, reserve=3, rows=10, cpu_gbps=1.0, max_delay_us=4000)
    rig, generator = Rig(spec), np.random.default_rng(4)
    for token in range(15):
        play_token(rig, random_ids(spec, generator), token)
    rig.host.wait_for_copies()
    rig.check_places()


def run_failing(rig: Rig, error: type[Exception], match: str, **token: object) -> Gpu:
    """Serve a token that must fail, and check that the GPU's program ends."""
    rig.host.clear_flags()
    gpu = Gpu(
        rig, 0, token.pop("ids", random_ids(rig.spec, np.random.default_rng(0))), token.pop("stop_at", None)
    )
    gpu.start()
    with pytest.raises(error, match=match):
        rig.host.serve_token(None, **token)
    gpu.join(60)
    assert rig.all_raised()
    return gpu


def test_timeout() -> None:
    """The GPU never routes layer 1; the next token is served as usual."""
    rig = Rig(Spec())
    run_failing(rig, DeviceError, "did not route MoE layer 1 within 0.05", stop_at=1, timeout_s=0.05)
    rig.check_places()
    play_token(rig, random_ids(rig.spec, np.random.default_rng(5)), 1)


def test_abort() -> None:
    """Another thread aborts while the host waits for layer 2."""
    rig = Rig(Spec())
    stopped = threading.Event()

    def stop() -> None:
        while rig.box.summed[1, 0] == 0:
            pass
        rig.host.abort()
        stopped.set()

    threading.Thread(target=stop, daemon=True).start()
    run_failing(rig, RuntimeError, "aborted at layer 2", stop_at=2)
    assert stopped.wait(10)
    rig.check_places()
    play_token(rig, random_ids(rig.spec, np.random.default_rng(5)), 1)


@pytest.mark.parametrize("wrong", [10, -1, "twice"])
def test_wrong_expert_ids(wrong: int | str) -> None:
    """The error names the layer and the id, and the flags are raised."""
    rig = Rig(Spec())
    ids = random_ids(rig.spec, np.random.default_rng(0))
    ids[1, 2] = ids[1, 0] if wrong == "twice" else wrong
    run_failing(rig, RuntimeError, "MoE layer 1: expert .* out of range or chosen twice", ids=ids)
    rig.check_places()


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_a_failing_copy(copies: int) -> None:
    """The token fails, and experts whose copy did not arrive are not resident."""
    rig = Rig(Spec(cpu_gbps=1.0, max_delay_us=50))
    rig.copier.fail_after(copies)
    generator = np.random.default_rng(0)

    def tokens() -> None:
        for token in range(20):
            rig.host.clear_flags()
            gpu = Gpu(rig, token, random_ids(rig.spec, generator))
            gpu.start()
            try:
                rig.host.serve_token()
            finally:
                gpu.join(60)
                assert not gpu.is_alive()

    with pytest.raises(DeviceError, match=r"copy of the stand-in device failed.*\n.*--device cpu"):
        tokens()
    assert rig.all_raised()
    rig.check_places()


def test_an_expert_that_is_nowhere() -> None:
    """An expert in no tier is an error, not a wrong answer."""
    rig = Rig(Spec())
    rig.ram_rows[:] = -1
    run_failing(rig, RuntimeError, "neither in RAM nor on the GPU")


def test_wrong_arguments() -> None:
    """The error names each."""
    rig = Rig(Spec())
    rig.box.tensors["cpu_sums"] = torch.zeros(3, 32)
    with pytest.raises(ValueError, match=r"cpu_sums: shape \[3, 32\] given, \[L=3, H=64\] needed"):
        rig.make_host()
    rig = Rig(Spec())
    rig.ram_rows[4] = 99
    with pytest.raises(ValueError, match=r"ram_rows\[4\]: 99 given, -1 or a row of ram's 30 needed"):
        rig.make_host()
    rig = Rig(Spec())
    rig.slab = rig.slab[:, :100]
    rig.slab = rig.slab.contiguous()
    with pytest.raises(ValueError, match=r"stride: 100 bytes given, at least an expert's 3456 needed"):
        rig.make_host()
    with pytest.raises(ValueError, match=r"ids: shape \[2, 4\] given, \[L=3, k=4\] needed"):
        Rig(Spec()).host.serve_token(torch.zeros(2, 4, dtype=torch.int32))
