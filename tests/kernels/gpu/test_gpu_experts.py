"""The expert kernels against fp64: Triton's interpreter where there is no GPU, and the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.experts import Routing, random_arrays, random_routing, reference
from helpers.paths import TINY_K2
from moebox.config import load_config
from moebox.kernels.gpu.reference import experts as experts_reference
from moebox.kernels.gpu.slots import slot_layout
from moebox.kernels.gpu.triton import experts
from moebox.offload.checkpoint.layout import ExpertLayout

BAR = 5e-3
FINE = 2e-4
"""One token is multiplied in fp32: far finer than bf16."""

K2_SHAPE = (7168, 2048)
Arrays = list[list[Tensor]]


@pytest.fixture(params=[experts, experts_reference], ids=["triton", "torch"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Any:
    """Both implementations. The interpreter takes 0.2 s a program, so it gets few and large tiles."""
    if device.type == "cpu":
        monkeypatch.setattr(experts, "GATE_UP_ONE", experts.RowTiles(4, 8))
        monkeypatch.setattr(experts, "DOWN_ONE", experts.RowTiles(4, 8))
        monkeypatch.setattr(experts, "GATE_UP_MANY", experts.Tiles(64, 32, 16, 16, 4, 2))
        monkeypatch.setattr(experts, "DOWN_MANY", experts.Tiles(64, 32, 16, 16, 4, 2))
    return request.param


def make_slab(
    shape: tuple[int, int], slots: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Arrays]:
    """Random experts in slots 256 bytes longer than an expert; the bytes behind it would be NaN scales."""
    arrays = [random_arrays(*shape, generator) for _ in range(slots)]
    nbytes = slot_layout(shape).nbytes
    slab = torch.full((slots, nbytes + 256), 255, dtype=torch.uint8)
    for slot, tensors in zip(slab, arrays, strict=True):
        slot[:nbytes] = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    return slab.to(device), arrays


def flip_signs(slab: Tensor, arrays: Arrays, shape: tuple[int, int]) -> None:
    """Make every other scale negative, as the quantizer does."""
    layout = slot_layout(shape)
    for number, start in ((1, layout.gate_scale), (3, layout.up_scale), (5, layout.down_scale)):
        for slot, tensors in zip(slab, arrays, strict=True):
            tensors[number].view(-1)[::2] *= -1
            scale = tensors[number].flatten().view(torch.uint8)
            slot[start : start + len(scale)] = scale.to(slab.device)


def one(module: Any, slab: Tensor, shape: tuple[int, int], slots: list[int], hidden: Tensor) -> Tensor:
    """`experts_one` into NaNs, with weights 1, 1/2, 1/3… and invalid slots beyond the count."""
    device = slab.device
    listed = torch.tensor([len(slots), *slots, -1, 2**30], dtype=torch.int32, device=device)
    weights = 1 / torch.arange(1, len(slots) + 3, dtype=torch.float32, device=device)
    out = torch.full((shape[0],), torch.nan, device=device)
    module.experts_one(slab, shape, listed, weights, hidden.to(device), out)
    return out.cpu()


def expected_one(arrays: Arrays, slots: list[int], hidden: Tensor) -> Tensor:
    """fp64 of `one`."""
    count = len(slots)
    routing = Routing(
        torch.arange(count + 1), torch.zeros(count, dtype=torch.int32), 1 / torch.arange(1, count + 1)
    )
    chosen = [arrays[slot] for slot in slots]
    return reference(chosen, routing, hidden[None], torch.zeros(1, len(hidden)))[0]


def error(out: Tensor, expected: Tensor, before: Tensor | float = 0.0) -> float:
    """Relative L2 error of what was added."""
    return float((out.double() - expected).norm() / (expected - before).norm())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 32), (96, 160), (256, 64)], ids=str)
def test_one_token(module: Any, shape: tuple[int, int], device: torch.device, generator: Any) -> None:
    """Odd numbers of groups; scales of both signs; a slot listed twice."""
    slab, arrays = make_slab(shape, 3, device, generator)
    flip_signs(slab, arrays, shape)
    hidden = torch.randn(shape[0], generator=generator).bfloat16()
    slots = [2, 0, 2] if shape[0] < 100 else [1]
    out = one(module, slab, shape, slots, hidden)
    assert error(out, expected_one(arrays, slots, hidden)) < FINE


def test_one_token_with_more_groups_than_lanes(
    module: Any, device: torch.device, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 groups a row: the last step of a warp is partly masked."""
    if device.type == "cpu":
        monkeypatch.setattr(experts, "DOWN_ONE", experts.RowTiles(4, 64))
    slab, arrays = make_slab((1280, 32), 1, device, generator)
    hidden = torch.randn(1280, generator=generator).bfloat16()
    out = one(module, slab, (1280, 32), [0], hidden)
    assert error(out, expected_one(arrays, [0], hidden)) < FINE


def test_one_token_and_no_expert(module: Any, device: torch.device, generator: Any) -> None:
    """`out` is overwritten with zeros."""
    slab, _ = make_slab((64, 32), 1, device, generator)
    assert one(module, slab, (64, 32), [], torch.ones(64).bfloat16()).eq(0).all()


def many(
    module: Any, slab: Tensor, shape: tuple[int, int], slots: list[int], routing: Routing, *tensors: Tensor
) -> Tensor:
    """`experts_many` for (hidden, out), added to a copy of `out`."""
    device = slab.device
    hidden, out = tensors
    out = out.to(device, copy=True)
    placed = (routing.offsets, routing.tokens, routing.weights, hidden)
    chosen = torch.tensor(slots, dtype=torch.int32, device=device)
    module.experts_many(slab, shape, chosen, *(tensor.to(device) for tensor in placed), out)
    return out.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, counts", [((96, 160), [3, 0, 40]), ((32, 32), [1, 2, 1]), ((224, 96), [0, 0, 33])], ids=str
)
def test_many_tokens(
    module: Any, shape: tuple[int, int], counts: list[int], device: torch.device, generator: Any
) -> None:
    """Odd numbers of groups, tiles not filled, an expert without tokens; the kernel adds to `out`."""
    slab, arrays = make_slab(shape, 4, device, generator)
    flip_signs(slab, arrays, shape)
    slots, n_tokens = [3, 0, 2], max(counts) + 2
    routing = random_routing(counts, n_tokens, generator)
    hidden = torch.randn(n_tokens, shape[0], generator=generator).bfloat16()
    before = torch.randn(n_tokens, shape[0], generator=generator)
    out = many(module, slab, shape, slots, routing, hidden, before)
    expected = reference([arrays[slot] for slot in slots], routing, hidden, before)
    assert error(out, expected, before) < (BAR if module is experts else FINE)


@pytest.mark.slow
def test_repeated_tokens_in_rounds(
    module: Any, device: torch.device, generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token may come twice in an expert; rounds of few pairs add up to the same bits as one."""
    shape = (64, 32)
    slab, arrays = make_slab(shape, 3, device, generator)
    routing = random_routing([5, 2, 4], 3, generator, repeat=True)
    hidden = torch.randn(3, 64, generator=generator).bfloat16()
    before = torch.randn(3, 64, generator=generator)
    whole = many(module, slab, shape, [0, 1, 2], routing, hidden, before)
    assert error(whole, reference(arrays, routing, hidden, before), before) < BAR
    monkeypatch.setattr(experts, "ROUND_PAIRS", 6)
    assert torch.equal(many(module, slab, shape, [0, 1, 2], routing, hidden, before), whole)


def test_a_bad_activation_shows(module: Any, device: torch.device, generator: Any) -> None:
    """NaN reaches the output of its token, and of no other."""
    slab, _ = make_slab((32, 32), 1, device, generator)
    hidden = torch.randn(3, 32, generator=generator).bfloat16()
    hidden[1, 7] = torch.nan
    assert one(module, slab, (32, 32), [0], hidden[1]).isnan().all()
    out = many(module, slab, (32, 32), [0], random_routing([3], 3, generator), hidden, torch.zeros(3, 32))
    assert out.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [K2_SHAPE, (256, 64), (96, 160)], ids=str)
def test_layout_is_that_of_the_disk(shape: tuple[int, int]) -> None:
    """The same offsets as `ExpertLayout`."""
    config = replace(load_config(TINY_K2), hidden_size=shape[0], moe_intermediate_size=shape[1])
    layout = ExpertLayout(config)
    assert list(slot_layout(shape)) == layout.offsets
    assert slot_layout(shape).nbytes == layout.nbytes


def bad_shape(slab: Tensor) -> None:
    experts.experts_one(slab, (40, 32), *[torch.zeros(1)] * 4)


def bad_slab(slab: Tensor) -> None:
    experts.experts_one(slab[:, :100], (32, 32), *[torch.zeros(1)] * 4)


def bad_stride(slab: Tensor) -> None:
    experts.experts_many(slab.view(-1)[:-1].view(1, -1), (32, 32), *[torch.zeros(1)] * 6)


def bad_hidden(slab: Tensor) -> None:
    listed, weights = torch.zeros(2, dtype=torch.int32), torch.zeros(1)
    experts.experts_one(slab, (32, 32), listed, weights, torch.zeros(32), torch.zeros(32))


def bad_counts(slab: Tensor) -> None:
    ints = torch.zeros(2, dtype=torch.int32)
    floats = torch.zeros(2), torch.zeros(1, 32).bfloat16(), torch.zeros(1, 32)
    experts.experts_many(slab, (32, 32), ints[:1], ints, ints, *floats, counts=[1])


@pytest.mark.parametrize(
    "call, says",
    [
        (bad_shape, "multiples of 32"),
        (bad_slab, "an expert has 1728 bytes"),
        (bad_stride, "multiples of 16"),
        (bad_hidden, "hidden is torch.float32"),
        (bad_counts, "1 counts of 1 pairs, for 1 experts and 2 pairs"),
    ],
)
def test_refuses(call: Callable[[Tensor], None], says: str) -> None:
    """A call that would read beyond a slot or misread an array is refused before a kernel is launched."""
    with pytest.raises(ValueError, match=says):
        call(torch.zeros(1, 4096, dtype=torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestK2:
    """Kimi K2's shape, which is too much for the interpreter."""

    @pytest.mark.parametrize("count", [0, 1, 3, 8])
    def test_one_token(self, count: int, device: torch.device, generator: Any) -> None:
        """The list is in pinned memory, and a captured graph reads it at each replay."""
        slab, arrays = make_slab(K2_SHAPE, 8, device, generator)
        hidden = torch.randn(K2_SHAPE[0], generator=generator).bfloat16()
        listed = torch.zeros(9, dtype=torch.int32).pin_memory()
        weights = (1 / torch.arange(1, 9)).pin_memory()
        placed, out = hidden.to(device), torch.empty(K2_SHAPE[0], device=device)
        call = (slab, K2_SHAPE, listed, weights, placed, out)
        experts.experts_one(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            experts.experts_one(*call)
        slots = [5, 0, 7, 1, 2, 6, 3, 4][:count]
        listed[: 1 + count] = torch.tensor([count, *slots])
        out.fill_(torch.nan)
        graph.replay()
        first = out.cpu()
        assert error(first, expected_one(arrays, slots, hidden)) < FINE if count else bool(first.eq(0).all())
        graph.replay()
        assert torch.equal(out.cpu(), first)

    def test_many_tokens(self, device: torch.device, generator: Any) -> None:
        """More than one tile of tokens, and the same bits twice."""
        slab, arrays = make_slab(K2_SHAPE, 3, device, generator)
        routing = random_routing([200, 1, 65], 256, generator)
        hidden = torch.randn(256, K2_SHAPE[0], generator=generator).bfloat16()
        before = torch.randn(256, K2_SHAPE[0], generator=generator)
        out = many(experts, slab, K2_SHAPE, [0, 1, 2], routing, hidden, before)
        assert error(out, reference(arrays, routing, hidden, before), before) < BAR
        assert torch.equal(many(experts, slab, K2_SHAPE, [0, 1, 2], routing, hidden, before), out)
