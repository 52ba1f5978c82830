"""The same bits wherever an expert lies and in whatever order reads end; what an error leaves behind."""

import numpy as np
import pytest
import torch

from helpers.offload.store import AlwaysOn, SlowStore
from helpers.offload.tiers import EXPERTS, FIRST, LAYERS, TOP_K, small_config
from moebox.errors import CheckpointError
from moebox.kernels import cpu
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.experts import TIERS
from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefetch.prefetch import Prefetcher

CONFIG = small_config()


@pytest.fixture(scope="module")
def pool():
    return cpu.ThreadPool(2, pin=False)


@pytest.fixture(scope="module")
def whole():
    ram = RamSlab(CONFIG)
    ram.fill_synthetic()
    return ram


def chunk(count, generator, dtype=torch.bfloat16):
    """Ids, weights and hidden states of a layer; a few experts are popular, as a router has them."""
    scores = torch.rand(count, EXPERTS, generator=generator) + torch.linspace(0, 0.5, EXPERTS)
    ids = scores.topk(TOP_K).indices
    weights = torch.rand(count, TOP_K, generator=generator)
    return ids, weights, torch.randn(count, CONFIG.hidden_size, generator=generator).to(dtype)


def plain(pool, whole, moe, ids, weights, hidden):
    """One call of the kernel with all experts of the layer."""
    pairs = sorted((int(e), t, j) for t, row in enumerate(ids.tolist()) for j, e in enumerate(row))
    chosen = sorted({expert for expert, _, _ in pairs})
    counts = [sum(expert == pair[0] for pair in pairs) for expert in chosen]
    out = torch.zeros(hidden.shape)
    cpu.experts_forward(
        pool,
        [whole.expert(int(whole.rows[moe * EXPERTS + expert])) for expert in chosen],
        np.cumsum([0, *counts]).astype(np.int32),
        np.array([t for _, t, _ in pairs], np.int32),
        np.array([weights[t, j] for _, t, j in pairs], np.float32),
        hidden,
        out,
    )
    return out


def experts_with(store, pool, rows, reserve=TOP_K):
    cache = RamCache(RamSlab(CONFIG, rows), store, reserve)
    cache.fill(range(rows - reserve))
    return CpuExperts(CONFIG, cache, pool)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [2 * TOP_K, 20, 40, 63])
def test_same_bits_as_all_in_ram(whole, pool, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    store = SlowStore(whole, seed=rows)
    experts = experts_with(store, pool, rows)
    in_ram = CpuExperts(CONFIG, RamCache(whole), pool)
    for count in (1, 1, 7, 150, 1, 1, 1, 40, 1, 1, 1, 1):
        for moe in range(LAYERS):
            given = chunk(count, generator, dtype)
            out = experts.forward(FIRST + moe, *given)
            expected = plain(pool, whole, moe, *given)
            assert torch.equal(out, expected)
            assert torch.equal(in_ram.forward(FIRST + moe, *given), expected)
            assert experts.last.hits + experts.last.cold == len(given[0].unique())
            assert in_ram.last.cold == 0
    assert store.under_way == []
    assert experts.cache.n_free == experts.cache.reserve


def test_hits_are_not_read_again(whole, pool):
    store = SlowStore(whole)
    experts = experts_with(store, pool, 20)
    given = chunk(1, torch.Generator().manual_seed(1))
    experts.forward(FIRST, *given)
    read = list(store.reads)
    experts.forward(FIRST, *given)
    assert store.reads == read
    assert (experts.last.hits, experts.last.cold, experts.last.cold_bytes) == (TOP_K, 0, 0)


def test_a_prompt_keeps_the_experts_that_score_most(whole, pool):
    experts = experts_with(SlowStore(whole), pool, 24)
    for layer in (FIRST, FIRST + 1):
        experts.forward(layer, *chunk(60, torch.Generator().manual_seed(layer)))
    scores = experts.cache.residency.scores()
    in_ram = {key for key in range(LAYERS * EXPERTS) if experts.cache.in_ram(key)}
    assert len(in_ram) == 24 - TOP_K
    best = set(np.argsort(-scores)[: len(in_ram)].tolist())
    assert len(in_ram & best) >= 0.8 * len(best)


@pytest.mark.parametrize("count", [1, 60])
def test_a_read_error_ends_the_pass_and_nothing_else(whole, pool, count):
    generator = torch.Generator().manual_seed(3)
    store = SlowStore(whole)
    experts = experts_with(store, pool, 12)
    for _ in range(3):
        given = chunk(count, generator)
        broken = {EXPERTS + int(expert) for expert in given[0].flatten()} - set(range(8))
        store.broken = {key for key in broken if not experts.cache.in_ram(key)}
        assert store.broken
        with pytest.raises(CheckpointError, match="broken"):
            experts.forward(FIRST + 1, *given)
        assert store.under_way == []
        store.broken = set()
        out = experts.forward(FIRST + 1, *given)
        assert torch.equal(out, plain(pool, whole, 1, *given))


def test_an_interrupt_in_the_middle_of_a_layer(whole, pool, monkeypatch):
    store = SlowStore(whole)
    experts = experts_with(store, pool, 12)
    given = chunk(40, torch.Generator().manual_seed(4))
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*arguments)

    forward = cpu.experts_forward
    monkeypatch.setattr(cpu, "experts_forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        experts.forward(FIRST, *given)
    monkeypatch.undo()
    assert store.under_way == []
    assert torch.equal(experts.forward(FIRST, *given), plain(pool, whole, 0, *given))


class PrefetchLog:
    """Prefetches the keys in `next`, and keeps the arguments of all calls."""

    def __init__(self, cache):
        self.cache, self.calls, self.next = cache, [], []

    def begin_layer(self, moe, picks):
        self.calls.append(("begin", moe, list(picks)))

    def prefetch_next(self, moe, hidden, picks):
        self.calls.append(("prefetch_next", moe, tuple(hidden.shape)))
        for key in self.next:
            self.cache.prefetch(key)

    def end_layer(self, moe):
        assert self.cache.n_free + len(self.next) >= self.cache.reserve

    def end_token(self):
        self.calls.append(("end",))


def test_the_prefetcher_is_called_in_decoding_only(whole, pool):
    store = SlowStore(whole)
    experts = experts_with(store, pool, 16, 2 * TOP_K)
    experts.prefetcher = log = PrefetchLog(experts.cache)
    generator = torch.Generator().manual_seed(5)
    first, second = chunk(1, generator), chunk(1, generator)
    log.next = [EXPERTS + int(expert) for expert in second[0][0]]
    experts.forward(FIRST, *first)
    log.next = []
    assert torch.equal(experts.forward(FIRST + 1, *second), plain(pool, whole, 1, *second))
    begun = [("begin", moe, sorted(given[0][0].tolist())) for moe, given in enumerate((first, second))]
    shape = (1, CONFIG.hidden_size)
    assert log.calls == [
        begun[0], ("prefetch_next", 0, shape), begun[1], ("prefetch_next", 1, shape), ("end",),
    ]  # fmt: skip
    assert experts.cache.counts.prefetched > 0
    log.next = [3, 40]
    experts.forward(FIRST, *first)
    seen = len(log.calls)
    many = chunk(30, generator)
    assert torch.equal(experts.forward(FIRST, *many), plain(pool, whole, 0, *many))
    assert len(log.calls) == seen
    assert store.under_way == []


class Recorder:
    """Keeps what it is told."""

    def __init__(self):
        self.seen = []

    def layer(self, moe, ids):
        self.seen.append((moe, ids.tolist()))


def test_the_recorder_sees_every_layer(whole, pool):
    experts = experts_with(SlowStore(whole), pool, 16)
    experts.recorder = recorder = Recorder()
    generator = torch.Generator().manual_seed(6)
    given = [chunk(count, generator) for count in (5, 1)]
    for part in given:
        for moe in range(LAYERS):
            experts.forward(FIRST + moe, *part)
    assert recorder.seen == [(moe, part[0].tolist()) for part in given for moe in range(LAYERS)]


class Known:
    """Statistics of a router that picked the last experts most."""

    def __init__(self, tokens):
        self.tokens = tokens

    def order(self):
        return list(range(LAYERS * EXPERTS))[::-1]

    def seed_scores(self):
        return np.arange(LAYERS * EXPERTS, dtype=np.float32)


@pytest.mark.parametrize("tokens", [None, 0, 100])
def test_statistics_choose_the_first_experts_in_ram(whole, pool, tokens):
    statistics = None if tokens is None else Known(tokens)
    calls = []
    experts = CpuExperts.load(
        CONFIG, SlowStore(whole), pool, 20, statistics, lambda *call: calls.append(call)
    )
    placement = experts.placement() == TIERS.index("RAM")
    assert placement.sum() == 20 - TOP_K
    assert calls[-1] == ("experts", 16 * CONFIG.expert_bytes, 16 * CONFIG.expert_bytes)
    if tokens:
        assert placement[1, -16:].all()
        assert experts.cache.residency.weakest(1) == [EXPERTS + 16]
    else:
        assert placement.sum(1).tolist() == [8, 8]


def test_all_in_ram_has_no_reserve(whole, pool):
    store = SlowStore(whole)
    experts = CpuExperts.load(CONFIG, store, pool, LAYERS * EXPERTS)
    assert (experts.placement() == TIERS.index("RAM")).all()
    experts.forward(FIRST, *chunk(20, torch.Generator().manual_seed(7)))
    assert store.reads == []


class Oracle:
    """Predicts what will be picked, and some other experts."""

    def __init__(self, rng):
        self.rng, self.picks = rng, []

    def predict(self, moe, hidden):
        for ahead, picks in enumerate(self.picks[moe + 1 : moe + 3], 1):
            others = self.rng.choice(EXPERTS, TOP_K)
            yield ahead, list(dict.fromkeys([*picks[1:], *others.tolist()]))


@pytest.mark.parametrize("rows", [2 * TOP_K, 20, 40, 60])
def test_predictions_change_which_experts_are_read_early_but_not_which_stay(pool, rows):
    """With prefetching and without, the same experts are in RAM after each layer."""
    config = small_config(num_hidden_layers=FIRST + 4)
    whole = RamSlab(config)
    whole.fill_synthetic()
    rng, generator = np.random.default_rng(rows), torch.Generator().manual_seed(rows)
    oracle = Oracle(rng)
    plain, prefetching = (CpuExperts.load(config, SlowStore(whole, seed=1), pool, rows) for _ in range(2))
    prefetching.prefetcher = Prefetcher(prefetching.cache, oracle, None, EXPERTS, AlwaysOn())
    for _ in range(40):
        given = [chunk(1, generator) for _ in range(4)]
        oracle.picks = [ids[0].tolist() for ids, _, _ in given]
        for moe in range(4):
            outs = [experts.forward(FIRST + moe, *given[moe]) for experts in (plain, prefetching)]
            assert torch.equal(*outs)
            placed = [experts.placement() for experts in (plain, prefetching)]
            assert (placed[0] == placed[1]).all()
    report = prefetching.prefetcher.report()
    assert report.used + report.late > 100
    assert plain.cache.counts.hits == prefetching.cache.counts.hits
    assert plain.cache.counts.reads == prefetching.cache.counts.reads + prefetching.cache.counts.prefetched
