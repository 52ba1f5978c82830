"""The cache grows, has only committed tokens, and can be truncated."""

import pytest
import torch

from moebox.config import ModelConfig, parse_config
from moebox.quantize.synth.shapes import TINY_CONFIG
from moebox.runtime.model.kv_cache import FIRST_CAPACITY, KVCache, bytes_per_token

CONFIG: ModelConfig = parse_config(TINY_CONFIG)
WIDTH = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim


def append(cache, count, value=1.0):
    for layer in range(CONFIG.num_hidden_layers):
        cached = cache.append(layer, torch.full((count, WIDTH), value, dtype=torch.bfloat16))
    cache.commit([7] * count)
    return cached


def test_bytes_per_token():
    assert bytes_per_token(CONFIG, torch.bfloat16) == 3 * (64 + 16) * 2


def test_grows_and_keeps_values():
    cache = KVCache(CONFIG, torch.bfloat16, limit=1000)
    assert cache.nbytes == 0
    append(cache, 3, 1.0)
    assert cache.nbytes == FIRST_CAPACITY * bytes_per_token(CONFIG, torch.bfloat16)
    append(cache, FIRST_CAPACITY, 2.0)
    cached = append(cache, 1, 3.0)
    assert cached.shape == (FIRST_CAPACITY + 4, WIDTH)
    assert cached[:3].unique().tolist() == [1.0]
    assert cached[3:-1].unique().tolist() == [2.0]
    assert cached[-1].unique().tolist() == [3.0]


def test_capacity_stays_below_the_limit():
    cache = KVCache(CONFIG, torch.bfloat16, limit=300)
    append(cache, 290)
    assert cache.nbytes == 300 * bytes_per_token(CONFIG, torch.bfloat16)


def test_uncommitted_values_are_overwritten():
    cache = KVCache(CONFIG, torch.bfloat16, limit=100)
    append(cache, 5, 1.0)
    cache.append(0, torch.full((50, WIDTH), 9.0, dtype=torch.bfloat16))
    assert len(cache) == 5
    cached = cache.append(0, torch.full((1, WIDTH), 2.0, dtype=torch.bfloat16))
    assert cached.shape[0] == 6
    assert cached[:, 0].tolist() == [1.0] * 5 + [2.0]


@pytest.mark.parametrize("length", [0, 4])
def test_truncate_keeps_memory(length):
    cache = KVCache(CONFIG, torch.bfloat16, limit=100)
    append(cache, 10)
    before = cache.nbytes
    cache.truncate(length)
    assert len(cache) == length == len(cache.tokens)
    assert cache.nbytes == before
