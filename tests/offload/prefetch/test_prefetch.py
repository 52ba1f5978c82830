"""Prefetches: into which rows they may be read, when they are cancelled, and how they are counted."""

import logging

import numpy as np
import pytest
import torch

from helpers.offload.store import AlwaysOn, SlowStore
from helpers.offload.tiers import EXPERTS, TOP_K, small_config
from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefetch.ab_trial import LAST_TOKENS, LEAST_ON, Trial
from moebox.offload.prefetch.prefetch import Prefetcher

LAYERS = 4
HIDDEN = torch.zeros(1, 64)


class Fixed:
    """A predictor with fixed predictions: {(moe, ahead): experts}."""

    def __init__(self, predictions):
        self.predictions = predictions

    def predict(self, moe, hidden):
        assert hidden is HIDDEN
        return [(ahead, self.predictions[moe, ahead]) for ahead in (1, 2) if (moe, ahead) in self.predictions]


class Store(SlowStore):
    """A store whose reads end when a test says so."""

    def finish(self, keys):
        for ticket, (key, _) in self._open.items():
            if key in keys:
                self._end(ticket)


class Recall:
    """Counts what `RouterStatistics` would be told."""

    def __init__(self):
        self.notes = []

    def note_recall(self, ahead, found, picked):
        self.notes.append((ahead, found, picked))


@pytest.fixture(scope="module")
def whole():
    ram = RamSlab(small_config(num_hidden_layers=1 + LAYERS))
    ram.fill_synthetic()
    return ram


def build(whole, predictions, rows=40, held=32, reserve=TOP_K, chance=0.0, trial=None):
    """A prefetcher over a cache that holds layer 0 and has free rows."""
    store = Store(whole, chance=chance)
    cache = RamCache(RamSlab(whole.config, rows), store, reserve)
    cache.fill(range(held))
    statistics = Recall()
    prefetcher = Prefetcher(cache, Fixed(predictions), statistics, EXPERTS, trial or AlwaysOn())
    return prefetcher, cache, store, statistics


def layer(prefetcher, cache, moe, picks):
    """One layer, as `CpuExperts` does it."""
    keys = [moe * EXPERTS + expert for expert in picks]
    cache.use(np.array(keys, np.int32))
    prefetcher.begin_layer(moe, picks)
    cache.demand(*keys)
    prefetcher.prefetch_next(moe, HIDDEN, picks)
    for key in keys:
        cache.wait(key)
    cache.done(keys)
    cache.trim()
    prefetcher.end_layer(moe)


def keys(moe, *experts):
    return [moe * EXPERTS + expert for expert in experts]


def test_the_likeliest_that_are_not_in_ram_are_read_and_the_nearest_layer_comes_first(whole):
    predictions = {(0, 1): [5, 3, 9, 1, 7, 2], (0, 2): [8, 6, 4, 2]}
    prefetcher, cache, store, _ = build(whole, predictions, rows=32 + 6)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    assert store.reads == keys(1, 5, 3, 9, 1) + keys(2, 8, 6)
    assert prefetcher.report().issued == 6


def test_an_expert_in_ram_is_not_read(whole):
    prefetcher, cache, store, _ = build(whole, {(0, 1): [0, 1, 2, 3]}, held=34)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    assert store.reads == keys(1, 2, 3)


def test_no_expert_is_evicted_for_a_prediction(whole):
    prefetcher, cache, store, _ = build(whole, {(0, 1): [0, 1, 2, 3]}, rows=33)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    assert store.reads == keys(1, 0, 1, 2, 3)  # one row was free, and the others after the layer
    assert all(cache.in_ram(key) for key in range(29))
    assert cache.n_free == 0


def test_counts_what_was_in_time_late_and_wrong(whole):
    prefetcher, cache, store, _ = build(whole, {(0, 1): [5, 3, 9, 1]})
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    store.finish(keys(1, 5, 9))
    layer(prefetcher, cache, 1, [5, 3, 20, 21])
    report = prefetcher.report()
    assert (report.issued, report.used, report.late, report.wrong) == (4, 1, 1, 2)
    assert report.wasted_bytes == cache.ram.layout.nbytes  # of 9; 1 had not begun
    assert keys(1, 3)[0] in store.promoted
    assert store.reads[4:] == keys(1, 20, 21)
    assert store.under_way == []


def test_a_wrong_prefetch_under_way_is_cancelled_after_the_demanded_reads_are_queued(whole):
    prefetcher, cache, store, _ = build(whole, {(0, 1): [5, 3, 9, 1]})
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    prefetcher.begin_layer(1, [5, 20])
    assert sorted(store.under_way) == keys(1, 1, 3, 5, 9)
    cache.demand(*keys(1, 5, 20))
    prefetcher.prefetch_next(1, HIDDEN, [5, 20])
    assert sorted(store.under_way) == keys(1, 5, 20)


def test_a_layer_takes_rows_of_prefetches_before_those_of_residents(whole):
    predictions = {(0, 1): [5, 3], (0, 2): [8, 6]}
    prefetcher, cache, store, _ = build(whole, predictions, rows=36, reserve=0)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    layer(prefetcher, cache, 1, [20, 21, 22])
    assert all(cache.in_ram(key) for key in [*range(32), *keys(1, 20, 21, 22)])
    assert store.under_way == keys(2, 8)


def test_a_later_prediction_replaces_an_earlier_one(whole):
    predictions = {(0, 2): [8, 6, 4, 2], (1, 1): [8, 7, 5, 3, 6, 0]}
    prefetcher, cache, store, _ = build(whole, predictions, rows=60)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    layer(prefetcher, cache, 1, [0, 1, 2, 3])
    assert sorted(store.under_way) == keys(2, 3, 5, 6, 7, 8)  # 6 is still likely enough to be kept


def test_recall_counts_a_layer_s_k_likeliest_and_is_handed_on(whole):
    predictions = {(0, 1): [5, 3, 9, 1, 7], (0, 2): [8, 6, 4, 2], (1, 1): [4, 3, 2, 1]}
    prefetcher, cache, _, statistics = build(whole, predictions)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    layer(prefetcher, cache, 1, [5, 7, 3, 30])
    layer(prefetcher, cache, 2, [1, 2, 3, 30])
    assert prefetcher.report().recall == {1: (2 + 3) / 8, 2: 1 / 4}
    assert sorted(statistics.notes) == [(1, 2, 4), (1, 3, 4), (2, 1, 4)]


def test_without_predictions_there_is_no_recall(whole):
    assert build(whole, {})[0].report().recall == {1: None, 2: None}


def test_after_the_last_layer_nothing_is_under_way(whole):
    prefetcher, cache, store, _ = build(whole, {(0, 1): [5, 3, 9, 1]})
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    prefetcher.end_token()
    assert store.under_way == []
    assert cache.n_free == 8
    assert prefetcher.report().wrong == 4


def test_a_token_that_failed_does_not_change_the_counts_of_the_next(whole):
    prefetcher, cache, _, _ = build(whole, {(0, 1): [5, 3, 9, 1]})
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    cache.abandon()
    cache.demand(*keys(1, 5))
    cache.wait(keys(1, 5)[0])
    cache.done(keys(1, 5))
    prefetcher.begin_layer(0, [0, 1, 2, 3])
    prefetcher.begin_layer(1, [5, 3, 9, 1])
    report = prefetcher.report()
    assert (report.used, report.late) == (0, 0)
    assert cache.in_ram(keys(1, 5)[0])
    assert report.recall[1] is None


def test_the_trial_is_told_a_token_s_time_and_what_was_not_in_ram(whole):
    trial = AlwaysOn()
    prefetcher, cache, store, _ = build(whole, {(0, 1): [5, 3, 9, 1]}, trial=trial)
    layer(prefetcher, cache, 0, [0, 1, 2, 3])
    store.finish(keys(1, 5, 3))
    layer(prefetcher, cache, 1, [5, 3, 20])
    prefetcher.end_token()
    seconds, to_read = trial.seen
    assert to_read == 3  # prefetches count, too: both sides of the trial count alike
    assert seconds > 0


def test_a_loss_switches_it_off_with_one_warning(whole, caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("moebox.offload.prefetch.prefetch.time.perf_counter", lambda: clock[0])
    prefetcher, cache, _, _ = build(whole, {(0, 1): [5, 3, 9, 1]}, trial=Trial())
    with caplog.at_level(logging.WARNING, "moebox"):
        for _ in range(LAST_TOKENS):
            issued = prefetcher.report().issued
            layer(prefetcher, cache, 0, [0, 1, 2, 3])
            clock[0] += 0.015 if prefetcher.report().issued > issued else 0.01
            prefetcher.end_token()
    report = prefetcher.report()
    assert not report.on
    assert report.change == pytest.approx(0.5, abs=0.02)
    assert report.issued == 4 * LEAST_ON
    assert [record.getMessage() for record in caplog.records] == [f"prefetch is off: {report.why_off}"]
    assert f"{report.change:+.1%}" in report.why_off


@pytest.mark.parametrize("seed", range(6))
def test_any_predictions_leave_rows_and_reads_right(whole, seed):
    """With random picks, predictions and ends of reads, weights are right and no row is lost."""
    rng = np.random.default_rng(seed)
    predictions = {}
    prefetcher, cache, store, _ = build(whole, predictions, rows=24, held=20, chance=0.3)
    for _ in range(60):
        routed = [rng.choice(EXPERTS, TOP_K, replace=False).tolist() for _ in range(LAYERS)]
        for moe in range(LAYERS):
            for ahead in (1, 2):
                if moe + ahead < LAYERS:
                    right = [e for e in routed[moe + ahead] if rng.random() < 0.7]
                    others = [e for e in rng.permutation(EXPERTS).tolist() if e not in right]
                    predictions[moe, ahead] = (right + others)[: 2 * TOP_K]
        broken_off = int(rng.integers(0, LAYERS)) if rng.random() < 0.1 else LAYERS
        for moe, picks in enumerate(routed[:broken_off]):
            layer(prefetcher, cache, moe, picks)
            for key in keys(moe, *picks):
                if cache.in_ram(key):
                    nbytes = cache.ram.layout.nbytes
                    assert torch.equal(cache.ram.slab[cache.row(key), :nbytes], whole.slab[key, :nbytes])
        if broken_off < LAYERS:
            cache.abandon()
        else:
            prefetcher.end_token()
        assert store.under_way == []
        assert cache.n_free + cache.residency.n_resident == 24
    report = prefetcher.report()
    assert report.issued >= report.used + report.late
    assert report.used > 0
    assert report.late > 0
    assert report.wrong > 0
