"""Routing traces: the published locality, files, and traces in the place of a router."""

import re

import numpy as np
import pytest

from helpers import version_0_1
from moebox.errors import RequestError
from moebox.offload.routing.trace import RoutingTrace, TraceRouting, age_classes, synthetic_trace

K2 = {"n_experts": 384, "top_k": 8}
WITHIN = 0.03


@pytest.fixture(scope="module", params=[0, 7])
def k2_trace(request):
    return synthetic_trace(800, 4, **K2, seed=request.param)


def test_published_share_of_picks_repeats_at_the_next_token(k2_trace):
    assert k2_trace.repeat_share() == pytest.approx(0.43, abs=WITHIN)


def test_same_seed_gives_the_same_trace_and_another_seed_another():
    one, again, other = (synthetic_trace(30, 2, **K2, seed=seed).ids for seed in (3, 3, 4))

    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_longer_trace_starts_with_the_shorter():
    assert np.array_equal(synthetic_trace(40, 2, **K2).ids[:15], synthetic_trace(15, 2, **K2).ids)


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 8), (8, 3), (64, 6), (256, 8), (9, 1)])
def test_any_shape_picks_different_experts_within_range(n_experts, top_k):
    trace = synthetic_trace(60, 3, n_experts, top_k)  # RoutingTrace itself refuses anything else

    assert trace.ids.shape == (60, 3, top_k)
    assert len(np.unique(trace.ids)) > n_experts / 2


def test_age_classes_cover_all_picks_that_do_not_repeat():
    bounds, masses = age_classes(384, 8)

    assert bounds == sorted(bounds)
    assert len(masses) == len(bounds) + 1 == 5
    assert sum(masses) == pytest.approx(1 - 0.42)


def test_save_and_load_keep_the_trace(tmp_path):
    trace = synthetic_trace(20, 3, 64, 6, seed=1)
    trace.save(tmp_path / "trace.bin")

    loaded = RoutingTrace.load(tmp_path / "trace.bin")

    assert np.array_equal(loaded.ids, trace.ids)
    assert (loaded.n_experts, loaded.source) == (64, "synthetic, seed 1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros((2, 2), np.int16)}, "must be int32 [tokens, layers, top_k]"),
        ({"ids": np.zeros((1, 1, 2), np.int16)}, "token 0, layer 0: an expert is picked twice"),
        ({"ids": np.full((1, 1, 1), 64, np.int16)}, "expert 64, must be within 0..63"),
        ({"ids": np.full((1, 1, 1), -1, np.int16)}, "expert -1, must be within 0..63"),
        ({"ids": np.zeros((1, 1, 1))}, "must be int32"),
        ({"format": 2}, "format 2; this version of moebox reads 1"),
    ],
)
def test_file_with_wrong_contents_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "trace.npz"
    fields = {"format": 1, "ids": np.zeros((1, 1, 1), np.int16), "n_experts": 64, "source": ""}
    np.savez(path, **(fields | change))

    with pytest.raises(RequestError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        RoutingTrace.load(path)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 cut off", b"text"])
def test_file_that_is_no_trace_is_refused_by_name(tmp_path, contents):
    path = tmp_path / "trace.npz"
    path.write_bytes(contents)

    with pytest.raises(RequestError, match=r"trace\.npz: not a routing trace"):
        RoutingTrace.load(path)


def test_file_without_a_field_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "trace.npz", format=1)

    with pytest.raises(RequestError, match=r"trace\.npz: not a routing trace"):
        RoutingTrace.load(tmp_path / "trace.npz")


def test_a_file_of_version_0_1_opens():
    trace = RoutingTrace.load(version_0_1.FOLDER / "trace.npz")
    assert (trace.n_experts, trace.source) == (version_0_1.EXPERTS, "tiny")
    assert np.array_equal(trace.ids, version_0_1.picks())


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RequestError, match=r"none\.npz: no such file"):
        RoutingTrace.load(tmp_path / "none.npz")


def test_trace_of_another_model_is_refused():
    trace = synthetic_trace(10, 2, 64, 6)
    trace.check(2, 64, 6, 10)

    with pytest.raises(RequestError, match="2 MoE layers, 64 experts, top 6; the model has 60, 384, top 8"):
        trace.check(60, 384, 8, 10)
    with pytest.raises(RequestError, match="10 tokens, the benchmark needs 11"):
        trace.check(2, 64, 6, 11)


def test_routing_gives_chunks_then_tokens_in_order():
    trace = synthetic_trace(12, 3, 16, 4)
    routing = TraceRouting(trace)

    first = [routing.prefill(layer, 5) for layer in range(3)]
    second = [routing.prefill(layer, 2) for layer in range(3)]
    decoded = [routing.decode(), routing.decode()]
    third = routing.prefill(0, 1)

    assert np.array_equal(np.stack(first, 1), trace.ids[:5])
    assert np.array_equal(np.stack(second, 1), trace.ids[5:7])
    assert np.array_equal(np.stack(decoded), trace.ids[7:9])
    assert np.array_equal(third, trace.ids[9:10, 0])


def test_routing_starts_again_after_the_last_token_and_on_rewind():
    trace = synthetic_trace(3, 1, 16, 4)
    routing = TraceRouting(trace)

    assert np.array_equal(routing.prefill(0, 5)[3:], trace.ids[:2, 0])
    routing.rewind()
    assert np.array_equal(routing.decode(), trace.ids[0])
    routing.rewind(2)
    assert np.array_equal(routing.decode(), trace.ids[2])


def test_every_damage_is_the_same_error(tmp_path):
    path, rng = tmp_path / "trace.npz", np.random.default_rng(1)
    synthetic_trace(40, 3, 8, 2).save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(600):
        data = bytearray(whole)
        data[rng.integers(len(data) - 700, len(data))] = rng.integers(0, 256)  # among the zip's own entries
        path.write_bytes(data)
        try:
            RoutingTrace.load(path)
        except RequestError as error:
            assert str(path) in error.what
            refused += 1
    assert refused > 200
