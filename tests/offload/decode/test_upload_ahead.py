"""Uploading ahead: layers are served the same experts, nothing is evicted for it, and the counts add up."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.offload.decode_rig import Gpu, Rig, Spec, check_layer, play_token, random_ids
from helpers.offload.tiers import build
from moebox.errors import DeviceError
from moebox.offload.decode.host_step import AHEAD_FIELDS, FIELDS
from moebox.offload.decode.upload_ahead import UploadAheadTrial
from moebox.offload.device.stand_in import StandInDevice

UPLOADS_ONLY = Spec(layers=4, slots=14, reserve=4, cpu_gbps=1e-3, recall=0.7)
PLACEMENTS = {
    "mixed": Spec(slots=12, reserve=3, recall=0.7),
    "split": Spec(inner=256, slots=12, reserve=3, recall=0.9),
    "split, exclusive": Spec(inner=96, slots=12, reserve=3, rows=24, recall=0.7),
    "uploads only": UPLOADS_ONLY,
    "all wrong": replace(UPLOADS_ONLY, recall=0.0),
    "exclusive, thrashing": Spec(slots=5, reserve=3, rows=30, recall=1.0),
    "exclusive, without a spare row": Spec(slots=12, reserve=3, rows=21, recall=0.7),
    "cold, as few rows as will do": Spec(slots=4, reserve=2, rows=12, spare=4, recall=0.7),
    "cold, split": Spec(inner=96, slots=6, reserve=2, rows=15, spare=4, recall=0.9),
}


def counts(rig: Rig) -> dict[str, int]:
    """Counts of all tokens so far."""
    return dict(zip(AHEAD_FIELDS, rig.host.ahead_counts.tolist(), strict=True))


def column(rig: Rig, name: str) -> np.ndarray:
    """A figure of each layer of the last token."""
    return rig.host.stats[:, FIELDS.index(name)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_expert_is_served_whatever_was_predicted(name: str, seed: int) -> None:
    """Whole experts or pieces of them: slots hold the right bytes while the GPU may read them."""
    spec = replace(PLACEMENTS[name], seed=seed, max_delay_us=(0, 100, 400)[seed])
    rig, generator = Rig(spec), np.random.default_rng(seed)
    rig.host.piece_bytes = (1 << 20, 1000, 700)[seed]
    wasted = early = 0.0
    for token in range(6):
        play_token(rig, random_ids(spec, generator), token, injected=bool(token % 2))
        served = sum(column(rig, field) for field in ("hits", "uploads", "part", "cpu", "cold"))
        assert (served == spec.top_k).all()
        assert (column(rig, "early") <= column(rig, "uploads")).all()
        wasted, early = wasted + column(rig, "wasted").sum(), early + column(rig, "early").sum()
    rig.host.wait_for_copies()
    rig.check_places()
    done = counts(rig)
    assert done["issued"] == done["used"] + done["late"] + done["wrong"]
    assert done["issued"] > 0 or not spec.max_delay_us  # without delays the GPU may be faster than the host
    assert done["wasted_bytes"] == pytest.approx(wasted * rig.nbytes)
    assert (early > 0) == (done["used"] + done["late"] > 0)
    assert 0 <= done["found"] <= done["picked"] <= 6 * (spec.layers - 1) * spec.top_k


def all_uploaded(recall: float | None, max_delay_us: float) -> tuple[list, set[int], dict[str, int]]:
    """Where all misses are uploaded: what each layer was served, in order; the residents; the counts."""
    spec = replace(UPLOADS_ONLY, recall=recall, max_delay_us=max_delay_us)
    rig, generator, served = Rig(spec), np.random.default_rng(7), []
    rig.host.piece_bytes = 500
    for token in range(6):
        gpu = play_token(rig, random_ids(spec, generator), token)
        for layer in gpu.layers:
            lists = [[(layer.slots[slot], weight) for slot, weight in road.items()] for road in
                     (layer.hits, layer.uploads)]  # fmt: skip
            served.append((*lists, layer.split, layer.total.tolist()))
    rig.host.wait_for_copies()
    return served, set(np.flatnonzero(rig.residency.table() >= 0).tolist()), counts(rig)


@pytest.mark.parametrize("recall", [0.0, 0.6, 1.0])
def test_predictions_change_neither_answers_nor_residents(recall: float) -> None:
    """Lists of slots keep their order, and sums their bits; no prediction evicts an expert."""
    served, residents, done = all_uploaded(recall, 300)
    expected, expected_residents, nothing = all_uploaded(None, 300)
    assert served == expected
    assert residents == expected_residents
    assert done["issued"] > 0
    assert not any(nothing.values())


class SlowGpu(Gpu):
    """Routes a layer when an upload of its predicted experts has begun."""

    before = -1

    def _predict(self, layer: int) -> None:
        self.before = counts(self.rig)["issued"]
        super()._predict(layer)

    def _layer(self, layer: int) -> None:
        end = time.monotonic() + 60
        while layer and counts(self.rig)["issued"] == self.before:
            assert time.monotonic() < end, "nothing was uploaded"
            time.sleep(1e-3)
        super()._layer(layer)


def play_slowly(rig: Rig, ids: np.ndarray, predicted_ids: torch.Tensor | None = None) -> Gpu:
    """Serve one token to a `SlowGpu`."""
    rig.host.clear_flags()
    gpu = SlowGpu(rig, 0, ids)
    gpu.start()
    rig.host.serve_token(None, 30.0, predicted_ids)
    gpu.join(60)
    assert gpu.error is None
    return gpu


def test_a_right_prediction_saves_its_upload() -> None:
    """Predicted experts are uploaded while the GPU computes, and the layer is served the same."""
    spec = replace(UPLOADS_ONLY, recall=1.0)
    rig = Rig(spec)
    ids = np.tile(np.arange(4, dtype=np.int32), (spec.layers, 1))
    gpu = play_slowly(rig, ids)
    done = counts(rig)
    assert done["found"] == done["picked"] == (spec.layers - 1) * spec.top_k
    assert done["issued"] == done["used"] + done["late"] >= spec.layers - 1
    assert column(rig, "early").sum() == done["issued"]
    for layer, seen in enumerate(gpu.layers):
        check_layer(rig, layer, seen)


def test_injected_predictions() -> None:
    """They replace the mailbox's once the GPU has predicted; ids of no expert are left out."""
    spec = replace(UPLOADS_ONLY, recall=0.0)
    rig = Rig(spec)
    ids = random_ids(spec, np.random.default_rng(4))
    predicted_ids = torch.from_numpy(ids.copy())
    missing = next(int(e) for e in ids[2] if rig.residency.slot(2 * spec.n_experts + int(e)) < 0)
    predicted_ids[2] = torch.tensor([-1, spec.n_experts, 2**31 - 1, missing])
    play_slowly(rig, ids, predicted_ids)
    assert counts(rig)["found"] == 2 * spec.top_k + 1
    assert counts(rig)["wrong"] == 0
    with pytest.raises(ValueError, match=r"predicted_ids: shape \[4, 3\] given, \[L=4, n=4\] needed"):
        rig.host.serve_token(None, 30.0, predicted_ids[:, :3].contiguous())


@pytest.mark.parametrize("copies", [0, 2, 9])
def test_a_failing_copy(copies: int) -> None:
    """The token fails, and experts whose copy did not arrive are not resident, predicted or not."""
    spec = replace(UPLOADS_ONLY, recall=1.0, max_delay_us=50)
    rig, generator = Rig(spec), np.random.default_rng(0)
    rig.host.piece_bytes = 900
    rig.copier.fail_after(copies)

    def tokens() -> None:
        for token in range(20):
            rig.host.clear_flags()
            gpu = Gpu(rig, token, random_ids(spec, generator))
            gpu.start()
            try:
                rig.host.serve_token()
            finally:
                gpu.join(60)
                assert not gpu.is_alive()

    with pytest.raises(DeviceError, match="copy of the stand-in device failed"):
        tokens()
    assert rig.all_raised()
    rig.check_places()


def test_uploads_ahead_of_a_token_that_fails_are_given_up() -> None:
    """The GPU predicts layer 1 and never routes it."""
    spec = replace(UPLOADS_ONLY, recall=1.0)
    rig, generator = Rig(spec), np.random.default_rng(1)
    ids = random_ids(spec, generator)
    rig.host.clear_flags()
    gpu = Gpu(rig, 0, ids, stop_at=1)
    gpu.start()
    with pytest.raises(DeviceError, match="did not route MoE layer 1"):
        rig.host.serve_token(None, 0.2)
    gpu.join(60)
    done = counts(rig)
    assert done["wrong"] == done["issued"] > 0
    rig.check_places()
    for token in range(3):
        play_token(rig, random_ids(spec, generator), token)
    rig.host.wait_for_copies()
    rig.check_places()


def test_without_predictions_nothing_is_uploaded_ahead() -> None:
    """The program never raises the flag of predictions."""
    rig = Rig(replace(UPLOADS_ONLY, recall=None))
    for token in range(3):
        play_token(rig, random_ids(rig.spec, np.random.default_rng(token)), token)
    assert not rig.host.ahead_counts.any()
    with pytest.raises(ValueError, match="piece_bytes: 0 given"):
        rig.host.piece_bytes = 0


class Verdict:
    """A trial whose result is fixed."""

    def __init__(self, on: bool) -> None:
        self.on, self.trying, self.change = on, False, -0.1 if on else 0.2
        self.why_off, self.seen = "tokens take +20.0% with it", []

    def observe(self, seconds: float, to_read: int) -> bool:
        """Always decides."""
        self.seen.append((seconds, to_read))
        return True


def test_the_log_says_once_that_uploading_ahead_does_not_pay(caplog: pytest.LogCaptureFixture) -> None:
    """The message has the figure, and so has the report."""
    host = SimpleNamespace(ahead_counts=np.arange(1, 8))
    ahead = UploadAheadTrial(host, Verdict(False))
    with caplog.at_level(logging.WARNING, "moebox"):
        for _ in range(3):
            ahead.observe(0.1, 4)
    assert [record.message for record in caplog.records] == [
        "uploading ahead is off: tokens take +20.0% with it"
    ]
    report = ahead.report()
    assert (report.issued, report.used, report.late, report.wrong, report.wasted_bytes) == (1, 2, 3, 4, 5)
    assert report.recall == {1: 6 / 7, 2: None}
    assert not report.on
    assert report.why_off and report.change == 0.2
    report = UploadAheadTrial(host, Verdict(True)).report()
    assert report.on and not report.why_off


def test_when_the_program_predicts() -> None:
    """Where something is uploaded at all; for an injected trace only if it has predictions of its own."""
    tiers = build(StandInDevice(max_delay_us=0), 12)
    assert not tiers.predicting
    tiers.upload_ahead(Verdict(True))
    assert tiers.predicting
    tiers.routing = SimpleNamespace()
    assert not tiers.predicting
    tiers.predictions = lambda: torch.zeros(2, 4, dtype=torch.int32)
    assert tiers.predicting
    for slots in (0, 68):
        tiers = build(StandInDevice(max_delay_us=0), slots)
        tiers.upload_ahead(Verdict(True))
        assert tiers.ahead is None
