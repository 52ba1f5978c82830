"""Router statistics: their counts, and their file after kills, full drives and damage."""

import gc
import logging
import os
import resource
import time
from multiprocessing import get_context

import numpy as np
import pytest

from helpers import version_0_1
from moebox.errors import RequestError
from moebox.offload.routing import counts
from moebox.offload.routing.counts import (
    PAIRED_TOKENS,
    RECENT_TOKENS,
    STATISTICS_HALF_LIFE_TOKENS,
    RoutingCounts,
)
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.statistics import SEED_SHARE, STATISTICS_FILE, RouterStatistics
from moebox.offload.routing.trace import synthetic_trace

LAYERS, EXPERTS, TOP_K = 3, 8, 2
MODEL = ModelIdentity("tiny", "00112233", LAYERS, EXPERTS, TOP_K)


def picks(tokens, seed=0):
    return synthetic_trace(tokens, LAYERS, EXPERTS, TOP_K, seed).ids


@pytest.fixture
def fresh(tmp_path):
    return RouterStatistics.open(MODEL, tmp_path)


def constant(tokens, *layers):
    """Picks of tokens that all pick the same experts."""
    return np.tile(np.array(layers, np.int32), (tokens, 1, 1))


def expected_uses(ids, half_life=STATISTICS_HALF_LIFE_TOKENS):
    uses = np.zeros((LAYERS, EXPERTS))
    for age, token in enumerate(ids[::-1]):
        for layer, experts in enumerate(token):
            uses[layer, experts] += 0.5 ** (age / half_life)
    return uses


def assert_same(one, other, ages=True):
    assert (one.digest, one.top_k, one.tokens) == (other.digest, other.top_k, other.tokens)
    np.testing.assert_allclose(one.uses, other.uses, rtol=1e-6)
    np.testing.assert_allclose(one.pairs, other.pairs, rtol=1e-5)
    assert np.array_equal(one.last_use, other.last_use)
    assert np.array_equal(one.recent, other.recent)
    assert np.array_equal(one.recall, other.recall)


def test_uses_decay_with_every_token(fresh, monkeypatch):
    monkeypatch.setattr(counts, "STATISTICS_HALF_LIFE_TOKENS", 10.0)
    monkeypatch.setattr(counts, "SAME_WEIGHT_TOKENS", 1)
    ids = picks(900)

    for start in range(0, 900, 25):  # weights grow by 2^90 meanwhile
        fresh.add(ids[start : start + 25], prefill=False)

    # A use counts 1 before its token is complete.
    np.testing.assert_allclose(fresh.uses(), expected_uses(ids, 10.0) * 0.5 ** (1 / 10), rtol=1e-6)


def test_counts_have_last_uses_and_pairs(fresh):
    fresh.add(constant(3, (0, 1), (2, 3), (4, 5)), prefill=True)
    fresh.add(constant(2, (0, 7), (2, 6), (5, 4)), prefill=False)

    seen = fresh.counts()

    assert seen.tokens == 5
    assert seen.last_use[0].tolist() == [4, 2, -1, -1, -1, -1, -1, 4]
    np.testing.assert_allclose(seen.pairs[0, 0], [0, 0, 5, 3, 0, 0, 2, 0], rtol=1e-3)
    np.testing.assert_allclose(seen.pairs[1, 6], [0, 0, 0, 0, 2, 2, 0, 0], rtol=1e-3)


def test_pairs_count_some_tokens_of_long_prompts(fresh):
    fresh.add(constant(4 * PAIRED_TOKENS, (0, 1), (2, 3), (4, 5)), prefill=True)

    seen = fresh.counts()

    assert seen.pairs[0, 0, 2] == pytest.approx(PAIRED_TOKENS, rel=0.05)
    assert seen.uses[0, 0] == pytest.approx(4 * PAIRED_TOKENS, rel=0.05)


def test_only_the_picks_of_the_last_decoded_tokens_are_kept(fresh, tmp_path):
    ids = picks(2 * RECENT_TOKENS + 300)
    fresh.add(ids[:100], prefill=True)
    for start in range(100, len(ids), 1000):
        fresh.add(ids[start : start + 1000], prefill=False)
        fresh.save()

    assert np.array_equal(fresh.trace().ids, ids[-RECENT_TOKENS:])
    assert np.array_equal(RouterStatistics.open(MODEL, tmp_path).trace().ids, ids[-RECENT_TOKENS:])


def test_statistics_without_tokens_are_empty_and_not_saved(fresh, tmp_path):
    assert fresh.trace() is None
    assert fresh.recall(1) is None
    assert fresh.order() == list(range(LAYERS * EXPERTS))
    assert not fresh.seed_scores().any()
    assert fresh.save()
    assert not list(tmp_path.iterdir())


def test_order_is_by_use_and_seeds_are_shares_of_average_scores(fresh):
    fresh.add(constant(30, (5, 1), (2, 3), (0, 7)), prefill=False)
    fresh.add(constant(10, (5, 4), (2, 6), (0, 1)), prefill=False)

    scores = fresh.seed_scores().reshape(LAYERS, EXPERTS)

    assert fresh.order()[:6] == [5, EXPERTS + 2, 2 * EXPERTS, 1, EXPERTS + 3, 2 * EXPERTS + 7]
    # The score of an expert that every token picks is a geometric series that halves every 16 tokens.
    in_a_long_run = sum(0.5 ** (age / 16) for age in range(2000))
    assert scores[0, 5] == pytest.approx(SEED_SHARE * in_a_long_run, rel=1e-3)
    assert scores[0, 1] == pytest.approx(0.75 * scores[0, 5], rel=1e-2)
    assert scores.sum(1) == pytest.approx(np.full(LAYERS, TOP_K * scores[0, 5]), rel=1e-3)


def test_a_second_run_continues_the_first(fresh, tmp_path):
    ids = picks(200)
    at_once = RouterStatistics(MODEL, tmp_path / "none")
    at_once.add(ids, prefill=False)
    at_once.note_recall(1, 7, 10)

    fresh.add(ids[:120], prefill=False)
    fresh.note_recall(1, 7, 10)
    fresh.close()
    second = RouterStatistics.open(MODEL, tmp_path)
    second.add(ids[120:], prefill=False)
    second.close()

    saved = RouterStatistics.open(MODEL, tmp_path)
    np.testing.assert_allclose(saved.uses(), at_once.uses(), rtol=1e-2)
    assert np.array_equal(saved.counts().last_use, at_once.counts().last_use)
    assert np.array_equal(saved.trace().ids, ids)
    assert saved.recall(1) == 0.7
    assert saved.recall(2) is None


def test_two_processes_that_run_at_once_lose_nothing(tmp_path):
    one, other = (RouterStatistics.open(MODEL, tmp_path) for _ in range(2))
    for start in range(3):
        one.add(picks(50, seed=start), prefill=False)
        other.add(picks(30, seed=10 + start), prefill=False)
        other.note_recall(2, 1, 4)
        one.save()
        other.save()

    both = RouterStatistics.open(MODEL, tmp_path)

    assert both.tokens == 240
    assert both.trace().tokens == 240
    assert both.uses().sum() == pytest.approx(240 * LAYERS * TOP_K, rel=0.02)
    assert both.counts().recall.tolist() == [[0, 0], [3, 12]]


def save_again_and_again(folder, seed, saves):
    gc.freeze()  # the parent's thread pools have no threads here: collecting one would wait for ever
    statistics = RouterStatistics.open(MODEL, folder)
    ids = picks(10, seed)
    for _ in range(saves):
        statistics.add(ids, prefill=False)
        assert statistics.save()


def writer(folder, seed, saves):
    """A running process that saves `saves` times."""
    process = get_context("fork").Process(target=save_again_and_again, args=(folder, seed, saves))
    process.start()
    return process


def test_real_processes_that_save_at_the_same_time_lose_nothing(tmp_path):
    running = [writer(tmp_path, seed, saves=25) for seed in range(3)]

    for process in running:
        process.join(timeout=120)
        assert process.exitcode == 0

    assert RouterStatistics.open(MODEL, tmp_path).tokens == 3 * 25 * 10


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / STATISTICS_FILE
    held = 0
    for round_number in range(20):
        stamp = path.stat().st_mtime_ns if path.exists() else None
        process = writer(tmp_path, round_number, saves=10**6)
        while not path.exists() or path.stat().st_mtime_ns == stamp:  # until it saves without a pause
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.002 * round_number)
        process.kill()
        process.join()

        saved = RoutingCounts.load(path)  # raises unless it is whole
        assert saved.tokens > held
        assert saved.tokens % 10 == 0
        held = saved.tokens
    statistics = RouterStatistics.open(MODEL, tmp_path)
    statistics.add(picks(1), prefill=False)
    assert statistics.save()
    assert {file.name for file in tmp_path.iterdir()} == {STATISTICS_FILE, f".{STATISTICS_FILE}.lock"}


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "cut off":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "zeros":
        data = bytearray(len(data))
    elif how == "one bit":
        data[len(data) // 3] ^= 4
    elif how == "text":
        data = bytearray(b"what is this")
    elif how == "another npz":
        with path.open("wb") as file:
            np.savez(file, format=1, digest="00112233")
        return
    elif how == "newer":
        with path.open("wb") as file:
            np.savez(file, format=99)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut off", "empty", "zeros", "one bit", "text", "another npz", "newer"])
def test_a_damaged_file_is_logged_and_set_aside(fresh, tmp_path, how, caplog):
    fresh.add(picks(50), prefill=False)
    fresh.save()
    path = tmp_path / STATISTICS_FILE
    damage(path, how)
    damaged = path.read_bytes()

    with caplog.at_level(logging.WARNING, "moebox"):
        again = RouterStatistics.open(MODEL, tmp_path)

    assert again.tokens == 0
    assert len(caplog.messages) == 1
    assert str(path) in caplog.text
    assert f"it is now {STATISTICS_FILE}.set-aside" in caplog.text
    assert (tmp_path / f"{STATISTICS_FILE}.set-aside").read_bytes() == damaged
    again.add(picks(5), prefill=False)
    assert again.save()
    assert RouterStatistics.open(MODEL, tmp_path).tokens == 5


def test_no_damage_is_read_as_statistics(fresh, tmp_path):
    fresh.add(picks(50), prefill=False)
    fresh.save()
    whole = (tmp_path / STATISTICS_FILE).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        try:
            read = RoutingCounts.from_bytes(bytes(data))
        except RequestError:
            refused += 1
        else:  # in a name, a date or another place that says nothing
            assert_same(read, RoutingCounts.from_bytes(whole))
    assert refused > 400


def test_a_file_damaged_before_a_save_loses_only_its_own_counts(fresh, tmp_path, caplog):
    fresh.add(picks(50), prefill=False)
    fresh.save()
    (tmp_path / STATISTICS_FILE).write_bytes(b"damaged by someone else")
    fresh.add(picks(20), prefill=False)

    assert fresh.save()

    assert RouterStatistics.open(MODEL, tmp_path).tokens == 20
    assert "set-aside" in caplog.text


def test_statistics_of_another_model_are_set_aside(fresh, tmp_path, caplog):
    fresh.add(picks(50), prefill=False)
    fresh.save()

    for other in (ModelIdentity("other", "ffff", 3, 8, 2), ModelIdentity("tiny", "00112233", 2, 8, 2)):
        caplog.clear()
        assert RouterStatistics.open(other, tmp_path).tokens == 0
        assert "router statistics of another model" in caplog.text
        (tmp_path / f"{STATISTICS_FILE}.set-aside").replace(tmp_path / STATISTICS_FILE)


def run_with_a_full_drive(folder, results):
    """Save once, three times on a full drive, and once after that; puts the file's tokens into `results`."""
    gc.freeze()  # the parent's thread pools have no threads here: collecting one would wait for ever
    caught = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())
    logging.getLogger("moebox").addHandler(handler)
    statistics = RouterStatistics.open(MODEL, folder)
    statistics.add(picks(10), prefill=False)
    done, held = [statistics.save()], []
    resource.setrlimit(resource.RLIMIT_FSIZE, (900, resource.RLIM_INFINITY))
    for _ in range(3):
        statistics.add(picks(10), prefill=False)
        done.append(statistics.save())
    held.append(RouterStatistics.open(MODEL, folder).tokens)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    done.append(statistics.save())
    held.append(RouterStatistics.open(MODEL, folder).tokens)
    results.put((done, held, caught))


def test_a_full_drive_is_logged_once_and_nothing_is_lost(tmp_path):
    context = get_context("fork")
    results = context.Queue()
    process = context.Process(target=run_with_a_full_drive, args=(tmp_path, results))
    process.start()
    done, held, caught = results.get(timeout=60)
    process.join()

    assert done == [True, False, False, False, True]
    assert held == [10, 40]
    assert caught == [f"{tmp_path / STATISTICS_FILE}: the router statistics cannot be saved: File too large"]


def test_a_folder_that_cannot_be_made_is_logged_once(tmp_path, caplog):
    (tmp_path / "models").write_text("a file where a folder should be")
    statistics = RouterStatistics.open(MODEL, tmp_path / "models" / "tiny")

    for _ in range(2):
        statistics.add(picks(5), prefill=False)
        assert not statistics.save()

    assert len(caplog.messages) == 1


def test_the_first_prompt_saves_and_later_ones_seldom_do(fresh, tmp_path, monkeypatch):
    def saved():
        return RouterStatistics.open(MODEL, tmp_path).tokens

    fresh.add(picks(1), prefill=False)
    assert saved() == 0
    fresh.add(picks(2), prefill=True)
    assert saved() == 3
    fresh.add(picks(4), prefill=True)
    assert saved() == 3

    monkeypatch.setattr("moebox.offload.routing.statistics.SAVE_EVERY_S", 0.0)
    fresh.add(picks(8), prefill=False)
    assert saved() == 3
    fresh.add(picks(16), prefill=True)
    assert saved() == 31


def test_a_file_of_version_0_1_opens():
    saved = RoutingCounts.load(version_0_1.FOLDER / STATISTICS_FILE)
    ids = version_0_1.picks()
    assert (saved.digest, saved.top_k, saved.tokens) == (MODEL.digest, TOP_K, 40)
    np.testing.assert_allclose(saved.uses, expected_uses(ids), rtol=3e-3)  # tokens are added in blocks
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        assert saved.last_use[layer, expert] == np.flatnonzero((ids[:, layer] == expert).any(1))[-1]
    assert saved.pairs.sum() == pytest.approx(40 * (LAYERS - 1) * TOP_K**2, rel=3e-3)
    assert np.array_equal(saved.recent, ids[version_0_1.PROMPT_TOKENS :])
    assert saved.recall.tolist() == [[3, 4], [1, 4]]
    assert np.array_equal(saved.placement.tiers.ravel(), np.arange(LAYERS * EXPERTS) % 3)


def test_the_statistics_of_version_0_1_go_on(tmp_path):
    (tmp_path / STATISTICS_FILE).write_bytes((version_0_1.FOLDER / STATISTICS_FILE).read_bytes())
    statistics = RouterStatistics.open(MODEL, tmp_path)
    statistics.add(picks(5), prefill=False)
    assert statistics.save()
    assert RouterStatistics.open(MODEL, tmp_path).tokens == 45


def test_merging_another_boxs_file(fresh, tmp_path):
    elsewhere = RouterStatistics.open(MODEL, tmp_path / "elsewhere")
    elsewhere.add(constant(30, (0, 1), (2, 3), (4, 5)), prefill=False)
    elsewhere.note_recall(1, 1, 2)
    elsewhere.save()
    fresh.add(constant(10, (6, 7), (6, 7), (6, 7)), prefill=False)

    fresh.merge(RoutingCounts.load(elsewhere.path))

    merged = RouterStatistics.open(MODEL, tmp_path).counts()
    assert merged.tokens == 40
    np.testing.assert_allclose(merged.uses[0], [30, 30, 0, 0, 0, 0, 10, 10], rtol=1e-2)
    # On both boxes the last token has used it.
    assert merged.last_use[0].tolist() == [39, 39, -1, -1, -1, -1, 39, 39]
    assert merged.recent[:, 0, 0].tolist() == [0] * 30 + [6] * 10
    assert merged.recall.tolist() == [[1, 2], [0, 0]]


def test_merging_another_models_file_is_refused(fresh, tmp_path):
    other = RoutingCounts.empty("ffff", 4, 8, 2)

    with pytest.raises(
        RequestError, match="of another model: 4 MoE layers, 8 experts, top 2, ffff; tiny has"
    ):
        fresh.merge(other)


def test_reset_forgets_all_but_later_counts_of_a_running_process(fresh, tmp_path):
    fresh.add(picks(50), prefill=False)
    fresh.save()
    running = RouterStatistics.open(MODEL, tmp_path)
    running.add(picks(7), prefill=False)

    fresh.reset()

    assert fresh.tokens == 0
    assert not (tmp_path / STATISTICS_FILE).exists()
    running.save()
    assert RouterStatistics.open(MODEL, tmp_path).tokens == 7


def test_the_placement_is_saved_with_process_and_time(fresh, tmp_path):
    tiers = np.arange(LAYERS * EXPERTS, dtype=np.uint8).reshape(LAYERS, EXPERTS) % 3
    fresh.placement = lambda: tiers
    fresh.add(picks(5), prefill=False)
    fresh.save()

    placement = RouterStatistics.open(MODEL, tmp_path).counts().placement

    assert np.array_equal(placement.tiers, tiers)
    assert placement.process == os.getpid()
    assert abs(placement.at_s - time.time()) < 60
