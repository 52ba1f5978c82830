"""Uploads on a guess: what the layers get is the same, nobody leaves for them, and the accounts balance."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.roads import Gpu, Rig, Spec, check_layer, random_ids, run_token
from helpers.tiers import build
from moebox.errors import DeviceError
from moebox.offload.decode.host_step import AHEAD_FIELDS, FIELDS
from moebox.offload.decode.upload_ahead import UploadsAhead
from moebox.offload.device.stand_in import StandInDevice

UPLOADS_ONLY = Spec(layers=4, slots=14, reserve=4, cpu_gbps=1e-3, recall=0.7)
PLACEMENTS = {
    "mixed": Spec(slots=12, reserve=3, recall=0.7),
    "divided": Spec(inner=256, slots=12, reserve=3, recall=0.9),
    "divided, exclusive": Spec(inner=96, slots=12, reserve=3, rows=24, recall=0.7),
    "uploads only": UPLOADS_ONLY,
    "all wrong": replace(UPLOADS_ONLY, recall=0.0),
    "exclusive, thrashing": Spec(slots=5, reserve=3, rows=30, recall=1.0),
    "exclusive, without a spare row": Spec(slots=12, reserve=3, rows=21, recall=0.7),
    "cold, as few rows as will do": Spec(slots=4, reserve=2, rows=12, spare=4, recall=0.7),
    "cold, divided": Spec(inner=96, slots=6, reserve=2, rows=15, spare=4, recall=0.9),
}


def counts(rig: Rig) -> dict[str, int]:
    """What was done so far."""
    return dict(zip(AHEAD_FIELDS, rig.roads.ahead.tolist(), strict=True))


def column(rig: Rig, name: str) -> np.ndarray:
    """The last token's figure of each layer."""
    return rig.roads.stats[:, FIELDS.index(name)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_expert_is_served_whatever_was_guessed(name: str, seed: int) -> None:
    """Whole experts or pieces of them: slots hold the right bytes while they may be read."""
    spec = replace(PLACEMENTS[name], seed=seed, max_delay_us=(0, 100, 400)[seed])
    rig, generator = Rig(spec), np.random.default_rng(seed)
    rig.roads.piece_bytes = (1 << 20, 1000, 700)[seed]
    wasted = early = 0.0
    for token in range(6):
        run_token(rig, random_ids(spec, generator), token, injected=bool(token % 2))
        served = sum(column(rig, field) for field in ("hits", "uploads", "part", "cpu", "cold"))
        assert (served == spec.top_k).all()
        assert (column(rig, "early") <= column(rig, "uploads")).all()
        wasted, early = wasted + column(rig, "wasted").sum(), early + column(rig, "early").sum()
    rig.roads.settle()
    rig.check_places()
    done = counts(rig)
    assert done["issued"] == done["used"] + done["late"] + done["wrong"]
    assert done["issued"] > 0 or not spec.max_delay_us  # without delays the GPU may be faster than the host
    assert done["wasted_bytes"] == pytest.approx(wasted * rig.nbytes)
    assert (early > 0) == (done["used"] + done["late"] > 0)
    assert 0 <= done["found"] <= done["picked"] <= 6 * (spec.layers - 1) * spec.top_k


def all_uploaded(recall: float | None, max_delay_us: float) -> tuple[list, set[int], dict[str, int]]:
    """What each layer was served, in order and to the bit, where all misses go up; who is resident then."""
    spec = replace(UPLOADS_ONLY, recall=recall, max_delay_us=max_delay_us)
    rig, generator, served = Rig(spec), np.random.default_rng(7), []
    rig.roads.piece_bytes = 500
    for token in range(6):
        gpu = run_token(rig, random_ids(spec, generator), token)
        for layer in gpu.layers:
            lists = [[(layer.slots[slot], weight) for slot, weight in road.items()] for road in
                     (layer.hits, layer.uploads)]  # fmt: skip
            served.append((*lists, layer.part, layer.total.tolist()))
    rig.roads.settle()
    return served, set(np.flatnonzero(rig.residency.table() >= 0).tolist()), counts(rig)


@pytest.mark.parametrize("recall", [0.0, 0.6, 1.0])
def test_answers_and_residents_are_those_without_guesses(recall: float) -> None:
    """The same lists in the same order, hence the same bits; right or wrong, a guess displaces nobody."""
    served, residents, done = all_uploaded(recall, 300)
    expected, expected_residents, nothing = all_uploaded(None, 300)
    assert served == expected
    assert residents == expected_residents
    assert done["issued"] > 0
    assert not any(nothing.values())


class SlowGpu(Gpu):
    """Routes a layer when an upload that it guessed has begun."""

    before = -1

    def _guess(self, layer: int) -> None:
        self.before = counts(self.rig)["issued"]
        super()._guess(layer)

    def _layer(self, layer: int) -> None:
        end = time.monotonic() + 60
        while layer and counts(self.rig)["issued"] == self.before:
            assert time.monotonic() < end, "nothing went up"
            time.sleep(1e-3)
        super()._layer(layer)


def run_slowly(rig: Rig, ids: np.ndarray, guesses: torch.Tensor | None = None) -> Gpu:
    """One token."""
    rig.roads.clear()
    gpu = SlowGpu(rig, 0, ids)
    gpu.start()
    rig.roads.run_token(None, 30.0, guesses)
    gpu.join(60)
    assert gpu.error is None
    return gpu


def test_a_right_guess_saves_its_upload() -> None:
    """While the GPU takes its time, what was guessed goes up; the layer gets it as if it had come later."""
    spec = replace(UPLOADS_ONLY, recall=1.0)
    rig = Rig(spec)
    ids = np.tile(np.arange(4, dtype=np.int32), (spec.layers, 1))
    gpu = run_slowly(rig, ids)
    done = counts(rig)
    assert done["found"] == done["picked"] == (spec.layers - 1) * spec.top_k
    assert done["issued"] == done["used"] + done["late"] >= spec.layers - 1
    assert column(rig, "early").sum() == done["issued"]
    for layer, seen in enumerate(gpu.layers):
        check_layer(rig, layer, seen)


def test_injected_guesses() -> None:
    """They take the place of the mailbox's, when the GPU has guessed; numbers of no expert are left out."""
    spec = replace(UPLOADS_ONLY, recall=0.0)
    rig = Rig(spec)
    ids = random_ids(spec, np.random.default_rng(4))
    guesses = torch.from_numpy(ids.copy())
    missing = next(int(e) for e in ids[2] if rig.residency.slot(2 * spec.n_experts + int(e)) < 0)
    guesses[2] = torch.tensor([-1, spec.n_experts, 2**31 - 1, missing])
    run_slowly(rig, ids, guesses)
    assert counts(rig)["found"] == 2 * spec.top_k + 1
    assert counts(rig)["wrong"] == 0
    with pytest.raises(ValueError, match=r"guesses: shape \[4, 3\] given, \[L=4, n=4\] needed"):
        rig.roads.run_token(None, 30.0, guesses[:, :3].contiguous())


@pytest.mark.parametrize("copies", [0, 2, 9])
def test_a_failing_copy(copies: int) -> None:
    """The token fails; what did not arrive is not taken for resident, a guess or not."""
    spec = replace(UPLOADS_ONLY, recall=1.0, max_delay_us=50)
    rig, generator = Rig(spec), np.random.default_rng(0)
    rig.roads.piece_bytes = 900
    rig.copier.fail_after(copies)

    def tokens() -> None:
        for token in range(20):
            rig.roads.clear()
            gpu = Gpu(rig, token, random_ids(spec, generator))
            gpu.start()
            try:
                rig.roads.run_token()
            finally:
                gpu.join(60)
                assert not gpu.is_alive()

    with pytest.raises(DeviceError, match="copy of the stand-in device failed"):
        tokens()
    assert rig.all_raised()
    rig.check_places()


def test_a_token_that_is_broken_off_leaves_nothing_behind() -> None:
    """The GPU guesses layer 1 and never routes it."""
    spec = replace(UPLOADS_ONLY, recall=1.0)
    rig, generator = Rig(spec), np.random.default_rng(1)
    ids = random_ids(spec, generator)
    rig.roads.clear()
    gpu = Gpu(rig, 0, ids, stop_at=1)
    gpu.start()
    with pytest.raises(DeviceError, match="did not route MoE layer 1"):
        rig.roads.run_token(None, 0.2)
    gpu.join(60)
    done = counts(rig)
    assert done["wrong"] == done["issued"] > 0
    rig.check_places()
    for token in range(3):
        run_token(rig, random_ids(spec, generator), token)
    rig.roads.settle()
    rig.check_places()


def test_without_guesses_nothing_goes_up() -> None:
    """A program that raises no flag: as if there were none."""
    rig = Rig(replace(UPLOADS_ONLY, recall=None))
    for token in range(3):
        run_token(rig, random_ids(rig.spec, np.random.default_rng(token)), token)
    assert not rig.roads.ahead.any()
    with pytest.raises(ValueError, match="piece_bytes: 0 given"):
        rig.roads.piece_bytes = 0


class Verdict:
    """A trial that has ended."""

    def __init__(self, on: bool) -> None:
        self.on, self.trying, self.change = on, False, -0.1 if on else 0.2
        self.why_off, self.seen = "tokens take +20.0% with it", []

    def observe(self, seconds: float, to_read: int) -> bool:
        """Decides each time."""
        self.seen.append((seconds, to_read))
        return True


def test_it_is_said_once_where_guesses_do_not_pay(caplog: pytest.LogCaptureFixture) -> None:
    """With the figure; the report has it, too."""
    roads = SimpleNamespace(ahead=np.arange(1, 8))
    ahead = UploadsAhead(roads, Verdict(False))
    with caplog.at_level(logging.WARNING, "moebox"):
        for _ in range(3):
            ahead.observe(0.1, 4)
    assert [record.message for record in caplog.records] == [
        "uploads on a guess are off: tokens take +20.0% with it"
    ]
    report = ahead.report()
    assert (report.issued, report.used, report.late, report.wrong, report.wasted_bytes) == (1, 2, 3, 4, 5)
    assert report.recall == {1: 6 / 7, 2: None}
    assert not report.on
    assert report.why_off and report.change == 0.2
    report = UploadsAhead(roads, Verdict(True)).report()
    assert report.on and not report.why_off


def test_who_guesses() -> None:
    """Only where something is uploaded at all, and never for a trace, unless that brings its own guesses."""
    tiers = build(StandInDevice(max_delay_us=0), 12)
    assert not tiers.guessing
    tiers.upload_ahead(Verdict(True))
    assert tiers.guessing
    tiers.routing = SimpleNamespace()
    assert not tiers.guessing
    tiers.guesses = lambda: torch.zeros(2, 4, dtype=torch.int32)
    assert tiers.guessing
    for slots in (0, 68):
        tiers = build(StandInDevice(max_delay_us=0), slots)
        tiers.upload_ahead(Verdict(True))
        assert tiers.ahead is None
