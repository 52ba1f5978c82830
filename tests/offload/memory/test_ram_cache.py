"""Reads into rows: when a row's bytes may be used, what is evicted, and what errors leave behind."""

import numpy as np
import pytest
import torch

from helpers.offload.store import SlowStore
from helpers.offload.tiers import small_config
from moebox.errors import CheckpointError
from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.memory.ram_slab import RamSlab


@pytest.fixture(scope="module")
def whole():
    ram = RamSlab(small_config())
    ram.fill_synthetic()
    return ram


@pytest.fixture
def store(whole):
    return SlowStore(whole)


def cache_of(store, rows, reserve=0, held=()):
    cache = RamCache(RamSlab(store.whole.config, rows), store, reserve)
    cache.fill(list(held))
    return cache


def holds(cache, key):
    """Whether the key's row has its bytes."""
    nbytes = cache.ram.layout.nbytes
    whole = cache.store.whole
    return torch.equal(cache.ram.slab[cache.row(key), :nbytes], whole.slab[whole.rows[key], :nbytes])


def use(cache, *keys):
    cache.use(np.array(keys, np.int32))


def test_filled_in_the_order_given(store):
    cache = cache_of(store, 5, held=[9, 3, 40])
    assert [cache.row(key) for key in (9, 3, 40)] == [0, 1, 2]
    assert cache.n_free == 2
    assert all(cache.in_ram(key) and holds(cache, key) for key in (9, 3, 40))
    assert store.reads == []
    assert cache.row(10) == -1


def test_a_miss_is_read_and_a_hit_is_not(store):
    cache = cache_of(store, 4, held=[1, 2])
    cache.demand(1, 7)
    assert store.reads == [7]
    assert not cache.in_ram(7)
    assert cache.row(7) >= 0
    cache.wait(7)
    assert cache.ready(7)
    assert holds(cache, 7)
    assert (cache.counts.hits, cache.counts.reads) == (1, 1)
    assert cache.ram.rows[7] == cache.row(7)


def test_the_weakest_makes_room_but_not_an_expert_in_use(store):
    cache = cache_of(store, 3, held=[1, 2, 3])
    use(cache, 2, 3)
    cache.demand(1)
    cache.residency.tick += 1
    use(cache, 3)
    cache.demand(8)
    cache.wait(8)
    assert [cache.in_ram(key) for key in (1, 2, 3, 8)] == [True, False, True, True]
    assert cache.ram.rows[2] == -1
    cache.done([1, 8])
    cache.demand(9, 10)
    assert not cache.in_ram(1)
    assert not cache.in_ram(8)


def test_more_in_use_than_rows(store):
    cache = cache_of(store, 2)
    cache.demand(1, 2)
    with pytest.raises(ValueError, match="3 experts in use, 2 rows"):
        cache.demand(3)


def test_trim_keeps_rows_free_and_new_experts_compete(store):
    cache = cache_of(store, 6, reserve=2, held=[1, 2, 3, 4])
    for _ in range(3):
        use(cache, 1, 2, 3, 4)
    use(cache, 20)
    cache.demand(20, 21)
    assert cache.n_free == 0
    for key in (20, 21):
        cache.wait(key)
    cache.done([20, 21])
    cache.trim()
    assert cache.n_free == 2
    assert [cache.in_ram(key) for key in (1, 2, 3, 4, 20, 21)] == [True] * 4 + [False] * 2


def test_all_in_ram_needs_neither_store_nor_reserve(whole):
    cache = RamCache(whole, reserve=4)
    cache.demand(*range(whole.n_keys))
    cache.trim()
    assert all(cache.ready(key) for key in range(whole.n_keys))
    with pytest.raises(ValueError, match="3 of 64 experts, and no store"):
        few = RamSlab(whole.config, 4)
        few.fill_synthetic(keys=[1, 2, 3])
        RamCache(few)


def test_prefetches_take_free_rows_only(store):
    cache = cache_of(store, 4, reserve=2, held=[1, 2])
    assert cache.prefetch(7)
    assert cache.prefetch(8)
    assert not cache.prefetch(9)
    assert not cache.prefetch(7)
    assert not cache.prefetch(1)
    assert not cache.in_ram(7)
    cache.trim()
    assert cache.in_ram(1)
    assert cache.in_ram(2)
    cache.demand(9)  # not predicted: a resident is evicted, and no prefetch is cancelled
    assert cache.row(7) >= 0
    assert cache.row(8) >= 0


def test_demand_takes_the_rows_of_prefetches(store):
    cache = cache_of(store, 3)
    for key in (7, 8, 9):
        assert cache.prefetch(key)
    cache.demand(1, 2)
    assert len(store.under_way) == 3
    cache.demand(7)
    for key in (1, 2, 7):
        cache.wait(key)
        assert holds(cache, key)


def test_a_prefetch_that_is_right(store):
    cache = cache_of(store, 4)
    cache.prefetch(7)
    cache.demand(7)
    assert store.promoted == [7]
    assert store.reads == [7]
    assert cache.counts.prefetched == 1
    assert cache.cancel_prefetch(7) == 0
    cache.wait(7)
    assert holds(cache, 7)


def test_a_prefetch_that_is_wrong(store):
    store.chance = 0
    cache = cache_of(store, 4)
    cache.prefetch(7)
    cache.prefetch(8)
    assert not cache.ready(8)
    store.chance = 1
    assert cache.ready(8)
    assert cache.cancel_prefetch(8) == cache.ram.layout.nbytes
    assert cache.cancel_prefetch(8) == 0
    cache.cancel_prefetches()
    assert store.under_way == []
    assert cache.n_free == 4
    assert cache.row(7) == cache.ram.rows[7] == -1


def test_a_read_that_fails_leaves_no_row(store):
    cache = cache_of(store, 3)
    store.broken = {7}
    cache.demand(6, 7, 8)
    cache.wait(6)
    with pytest.raises(CheckpointError, match="expert 7: broken"):
        cache.wait(7)
    cache.abandon()
    assert store.under_way == []
    assert [cache.in_ram(key) for key in (6, 7, 8)] == [True, False, False]
    assert cache.n_free == 2
    store.broken = set()
    cache.demand(7, 8)
    for key in (6, 7, 8):
        cache.wait(key)
        assert holds(cache, key)


@pytest.mark.parametrize("call", ["submit", "wait"])
def test_an_interrupt_anywhere_leaves_nothing_that_is_wrong(store, monkeypatch, call):
    cache = cache_of(store, 3, held=[1])

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    cache.prefetch(9)
    with monkeypatch.context() as patch:
        patch.setattr(store, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache.demand(1, 7)
            cache.wait(7)
        cache.abandon()
    assert store.under_way == []
    for _ in range(2):
        for key in (7, 8, 9):
            assert not cache.in_ram(key) or holds(cache, key)
            cache.demand(key)
            cache.wait(key)
            assert holds(cache, key)
            cache.done([key])


def test_random_demands_never_see_other_bytes(whole):
    rng = np.random.default_rng(5)
    store = SlowStore(whole, seed=1)
    cache = cache_of(store, 12, reserve=4)
    for step in range(400):
        picks = rng.choice(64, 4, replace=False).tolist()
        cache.residency.tick += 1
        use(cache, *picks)
        cache.demand(*picks)
        for key in rng.choice(64, 3).tolist():
            cache.prefetch(key)
        for key in picks:
            cache.wait(key)
            assert holds(cache, key)
        cache.done(picks)
        if step % 7 == 0:
            cache.cancel_prefetches()
        cache.trim()
        table = cache.residency.table()
        rows = table[table >= 0]
        assert len(set(rows.tolist())) == len(rows) == cache.residency.n_resident
        complete = cache.ram.rows >= 0
        assert (cache.ram.rows[complete] == table[complete]).all()
    assert cache.counts.hits > 0
    assert cache.counts.prefetched > 0
