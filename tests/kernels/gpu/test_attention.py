"""Latent attention against the references and fp64, at odd shapes and K2's, with caches more or less full."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from helpers.numbers import relative_l2
from moebox.kernels.gpu.reference import ops as reference
from moebox.kernels.gpu.triton import attention


@dataclass(frozen=True)
class Shape:
    """A model's attention."""

    heads: int
    rank: int
    rope: int
    nope: int
    v: int
    query: int | None
    capacity: int

    def tensor(self, *shape: int) -> torch.Tensor:
        """Random bf16."""
        return torch.randn(*shape).bfloat16()

    def rotations(self) -> torch.Tensor:
        """Cosines and sines of random angles."""
        angles = torch.rand(self.capacity, self.rope // 2) * 6.28
        return torch.stack([angles.cos(), angles.sin()])


ODD = Shape(heads=3, rank=40, rope=12, nope=24, v=20, query=56, capacity=300)
TINY_K2 = Shape(heads=8, rank=128, rope=32, nope=32, v=32, query=None, capacity=160)
MANY_HEADS = Shape(heads=70, rank=16, rope=2, nope=3, v=5, query=31, capacity=33)
K2 = Shape(heads=64, rank=512, rope=64, nope=128, v=128, query=1536, capacity=100_352)
SHAPES = pytest.mark.parametrize("shape", [ODD, TINY_K2, MANY_HEADS], ids=["odd", "tiny-k2", "many heads"])


@SHAPES
def test_latents(shape, device):
    rotations, position = shape.rotations().to(device), torch.tensor([17], device=device)
    width = shape.query or shape.heads * (shape.nope + shape.rope)
    q_kv = shape.tensor(width + shape.rank + shape.rope).to(device)
    q_weight = None if shape.query is None else torch.rand(width, device=device)
    kv_weight = torch.rand(shape.rank, device=device)
    cache = torch.full((shape.capacity, shape.rank + shape.rope), 7.0, device=device).bfloat16()
    expected = cache.clone()
    query = attention.latents(q_kv, q_weight, kv_weight, rotations, position, cache)
    expected_query = reference.latents(q_kv, q_weight, kv_weight, rotations, position, expected)
    assert relative_l2(query, expected_query) < 1e-3
    assert relative_l2(cache[17], expected[17]) < 1e-3
    others = torch.arange(shape.capacity) != 17
    assert torch.equal(cache[others], expected[others])


@pytest.mark.slow
@SHAPES
def test_absorb(shape, device):
    rotations, position = shape.rotations().to(device), torch.tensor([5], device=device)
    q = shape.tensor(shape.heads * (shape.nope + shape.rope)).to(device)
    kv_b = shape.tensor(shape.heads, shape.nope + shape.v, shape.rank).to(device)
    out = attention.absorb(q, kv_b, rotations, position)
    assert relative_l2(out, reference.absorb(q, kv_b, rotations, position)) < 1e-3
    exact = torch.einsum(
        "an,anr->ar", q.view(shape.heads, -1)[:, : shape.nope].double(), kv_b[:, : shape.nope].double()
    )
    assert relative_l2(out[:, : shape.rank], exact) < 3e-3


@SHAPES
def test_value_up(shape, device):
    o = torch.randn(shape.heads, shape.rank, device=device)
    kv_b = shape.tensor(shape.heads, shape.nope + shape.v, shape.rank).to(device)
    exact = torch.einsum("ar,avr->av", o.double(), kv_b[:, shape.nope :].double()).flatten()
    assert relative_l2(attention.value_up(o, kv_b, shape.v), exact) < 3e-3


def exact_attention(q, cache, count, scale, rank):
    """In fp64, on the tensors' own device."""
    seen = cache[:count].double()
    return torch.softmax(q.double() @ seen.T * scale, dim=-1) @ seen[:, :rank]


def check_mla(shape, count, device):
    """One query over `count` tokens; rows of the cache behind them must not change the result."""
    q = shape.tensor(shape.heads, shape.rank + shape.rope).to(device)
    cache = shape.tensor(shape.capacity, shape.rank + shape.rope).to(device)
    cache[count:] = torch.nan
    scale = (shape.rank + shape.rope) ** -0.5
    out = attention.mla_decode(q, cache, torch.tensor([count - 1], device=device), scale, shape.rank)
    assert relative_l2(out, exact_attention(q, cache, count, scale, shape.rank)) < 4e-3


@pytest.mark.slow
@SHAPES
@pytest.mark.parametrize("count", [1, 17, 33])
def test_mla_decode(shape, count, device):
    check_mla(shape, count, device)


@pytest.mark.parametrize("count", [127, 128, 129, 257, 300])
def test_mla_decode_over_several_programs(count, device):
    """Shares of the sequence: full, one token more, unequal."""
    check_mla(ODD, count, device)


@pytest.mark.parametrize(("splits", "count"), [(2, 300), (3, 290), (17, 300)])
def test_mla_decode_with_long_shares(splits, count, device, monkeypatch):
    """Each program takes several blocks of tokens, and the last programs may have none."""
    monkeypatch.setattr(attention, "PROGRAMS", splits)
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 16)
    check_mla(ODD, count, device)


def test_mla_decode_with_a_dominant_token(device):
    """One score is far above the rest, in any share: the softmax's running maximum must follow it."""
    for place in (0, 140, 299):
        cache = torch.randn(300, 52, device=device).bfloat16()
        q = torch.randn(3, 52, device=device).bfloat16()
        cache[place] = 30 * q[0]
        out = attention.mla_decode(q, cache, torch.tensor([299], device=device), 1.0, 40)
        assert relative_l2(out, exact_attention(q, cache, 300, 1.0, 40)) < 4e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("count", [1, 17, 4096, 100_000])
def test_mla_decode_of_k2(count, device):
    check_mla(K2, count, device)
