"""Predicted hit rates, and the source that they come from: a trace, statistics, published locality."""

import numpy as np
import pytest

from moebox.config import load_config
from moebox.errors import RequestError
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan.hits import (
    FEWEST_TOKENS,
    HitPredictor,
    find_hit_predictor,
    published_hit_predictor,
)
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.replay import replay
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace
from moebox.quantize.synth.write import synth


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def model(tmp_path):
    synth(tmp_path / "model", "tiny", format="int4")
    return tmp_path / "model"


def routed(config, tokens, seed=0):
    return synthetic_trace(tokens, *config.routing_shape, seed=seed)


def test_published_locality_of_a_large_model():
    curve = published_hit_predictor(shape_config("kimi-k2"))

    hits = [curve.hits(share) for share in (0.0, 0.1, 0.22, 0.44, 1.0)]

    assert hits == pytest.approx([0, 0.59, 0.755, 0.87, 1], abs=0.03)
    assert "published" in curve.source


def test_hits_do_not_depend_on_how_many_layers_there_are():
    deep, shallow = (HitPredictor(synthetic_trace(300, layers, 64, 6), "") for layers in (12, 4))

    assert deep.hits(0.3) == pytest.approx(shallow.hits(0.3), abs=0.04)


def test_the_cache_is_full_from_the_start():
    """Else a short trace would count the first use of every expert as a miss, whatever the cache."""
    trace = synthetic_trace(60, 2, 64, 6)

    assert HitPredictor(trace, "").hits(120 / 128) > replay(trace, 120, warmup=15) + 0.02


def test_longer_prompts_use_more_experts():
    curve = published_hit_predictor(shape_config("kimi-k2"))

    short, long = curve.expert_counts(16), curve.expert_counts(600)

    assert (sum(short), sum(long)) == (16 * 8, 600 * 8)
    assert len(short) < len(long) <= 384


def test_counts_of_a_prompt_longer_than_the_trace_are_scaled_up():
    ids = np.tile(np.array([[[0, 1]], [[0, 2]]], np.int32), (20, 1, 1))

    counts = HitPredictor(RoutingTrace(ids, 4), "").expert_counts(80)

    assert sorted(counts) == [40, 40, 80]


def test_without_trace_and_statistics_published_locality_is_used(model):
    assert "published" in find_hit_predictor(load_config(model), model, None).source


def test_the_models_own_statistics_come_before_published_locality(model):
    config = load_config(model)
    statistics = RouterStatistics.open(ModelIdentity.of(model, config))
    seen = routed(config, FEWEST_TOKENS)
    statistics.add(seen.ids, prefill=False)
    statistics.save()

    curve = find_hit_predictor(config, model, None)

    assert f"last {FEWEST_TOKENS} tokens of this model" in curve.source
    assert curve.hits(0.6) == HitPredictor(seen, "").hits(0.6)


def test_statistics_of_a_few_tokens_are_not_used(model):
    config = load_config(model)
    statistics = RouterStatistics.open(ModelIdentity.of(model, config))
    statistics.add(routed(config, FEWEST_TOKENS - 1).ids, prefill=False)
    statistics.save()

    assert "published" in find_hit_predictor(config, model, None).source


def test_a_recorded_trace_comes_first_and_must_be_of_the_model(model, tmp_path):
    config = load_config(model)
    routed(config, 40).save(tmp_path / "own.npz")
    synthetic_trace(40, 2, 64, 6).save(tmp_path / "other.npz")

    assert find_hit_predictor(config, model, tmp_path / "own.npz").source.startswith("own.npz, 40 recorded")
    with pytest.raises(RequestError, match="64 experts"):
        find_hit_predictor(config, model, tmp_path / "other.npz")
