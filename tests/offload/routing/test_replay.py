"""Replays of routing traces: the experts that each policy keeps, and its hits."""

import numpy as np
import pytest

from helpers.offload.decode_rig import Rig, Spec, play_token, random_ids
from moebox.errors import RequestError
from moebox.offload.decode.host_step import FIELDS
from moebox.offload.routing.replay import POLICIES, hit_curve, hits_of_tokens, replay
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace

K2 = {"n_experts": 384, "top_k": 8}
WITHIN = 0.03
WARMUP = 200


@pytest.fixture(scope="module", params=[0, 7])
def k2_trace(request):
    return synthetic_trace(800, 4, **K2, seed=request.param)


@pytest.mark.parametrize(("resident", "hits"), [(0.055, 0.40), (0.11, 0.57), (0.22, 0.74), (0.44, 0.86)])
def test_lru_cache_hits_as_published(k2_trace, resident, hits):
    slots = round(resident * 4 * 384)

    assert replay(k2_trace, slots, "lru", WARMUP) == pytest.approx(hits, abs=WITHIN)


def test_decayed_score_beats_lru_as_on_real_traces(k2_trace):
    slots = round(0.09 * 4 * 384)

    gain = replay(k2_trace, slots, "decayed", WARMUP) - replay(k2_trace, slots, "lru", WARMUP)

    assert 0.01 < gain < 0.09


def trace_of(*tokens):
    return RoutingTrace(np.array(tokens, np.int32).reshape(len(tokens), 1, -1), 16)


def test_replay_lru_evicts_the_least_recently_used():
    trace = trace_of([0, 1], [2, 3], [0, 1], [4, 5], [2, 3])

    # 2 slots, and room for one layer's misses: {0,1}, then {0,1,2,3} with hits 0 and 1, then {0,1,4,5}.
    assert replay(trace, 2, "lru") == 2 / 10
    assert replay(trace, 4, "lru") == 4 / 10
    assert replay(trace, 4, "lru", warmup=2) == 4 / 6


def test_replay_decayed_keeps_the_often_used():
    trace = trace_of([0, 1], [0, 1], [0, 1], [2, 3], [4, 5], [0, 1])

    assert replay(trace, 2, "lru") == 4 / 12
    for policy in ("decayed", "score"):
        assert replay(trace, 2, policy) == 6 / 12


def test_replay_with_room_for_all_experts_misses_first_uses_only():
    trace = synthetic_trace(50, 2, 16, 4)

    for policy in ("lru", "decayed"):
        assert replay(trace, 32, policy, warmup=40) == 1.0


@pytest.mark.parametrize(("slots", "policy", "warmup"), [(0, "lru", 0), (4, "fifo", 0), (4, "lru", 5)])
def test_replay_refuses_impossible_arguments(slots, policy, warmup):
    with pytest.raises(RequestError):
        replay(trace_of([0, 1], [2, 3], [4, 5], [6, 7], [0, 1]), slots, policy, warmup)


def test_replay_lfu_keeps_the_most_used_since_the_start():
    trace = trace_of([0, 1], [0, 1], [2, 3], [2, 4], [2, 5], [0, 1])

    assert replay(trace, 2, "lfu") == 5 / 12  # 0 is a hit in the end, 2 meanwhile has taken the slot of 1
    assert replay(trace, 2, "lru") == 4 / 12


def test_replay_belady_keeps_the_experts_that_are_needed_next():
    trace = trace_of([0, 1], [2, 3], [4, 5], [2, 3], [0, 1])

    assert replay(trace, 2, "belady") == 2 / 10
    assert replay(trace, 4, "belady") == 4 / 10
    assert replay(trace, 2, "lru") == 2 / 10
    assert hits_of_tokens(trace, 4, "belady").tolist() == [0, 0, 0, 2, 2]


def successions(tokens, layers=3, top_k=4, n_experts=32):
    """Each token's picks follow from the last token's, and no expert is picked again soon."""
    steps = np.arange(tokens)[:, None, None] * top_k + np.arange(top_k) + np.arange(layers)[:, None]
    return RoutingTrace((steps % n_experts).astype(np.int32), n_experts)


def test_decayed_learns_which_expert_follows_which():
    trace = successions(600)

    assert replay(trace, 32, "lru", warmup=300) == 0
    assert replay(trace, 32, "score", warmup=300) < 0.2
    assert replay(trace, 32, "decayed", warmup=300) > 0.25
    assert replay(trace, 32, "belady", warmup=300) > 0.3


def test_decayed_hits_as_often_as_the_gpus_cache():
    """Where every miss is uploaded, each token has the same number of hits."""
    spec = Spec(n_experts=16, slots=10, reserve=4, cpu_gbps=1e-6, inner=32)
    generator = np.random.default_rng(0)
    ids = np.stack([random_ids(spec, generator) for _ in range(60)])
    rig = Rig(spec)
    hits = []
    for token, picks in enumerate(ids):
        play_token(rig, picks, token)
        rig.copier.synchronize()
        stats = dict(zip(FIELDS, rig.host.stats.T, strict=True))
        assert (stats["hits"] + stats["uploads"] == spec.top_k).all()
        hits.append(int(stats["hits"].sum()))

    trace = RoutingTrace(ids, spec.n_experts)
    assert hits_of_tokens(trace, spec.slots - spec.reserve).tolist() == hits
    assert hits_of_tokens(trace, spec.slots - spec.reserve, "score").tolist() != hits


def test_no_policy_beats_belady(k2_trace):
    curve = hit_curve(k2_trace, [0.05, 0.2], warmup=0)

    assert tuple(curve) == POLICIES
    for policy in ("decayed", "lru", "lfu"):
        assert all(found <= best for found, best in zip(curve[policy], curve["belady"], strict=True))


@pytest.mark.parametrize("budget", [0.0, 1.5])
def test_hit_curve_refuses_a_budget_out_of_range(k2_trace, budget):
    with pytest.raises(RequestError, match=r"must be above 0 and at most 1 of all experts"):
        hit_curve(k2_trace, [budget])
