"""The router's kernel against the reference: ids exactly, weights to rounding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from moebox.kernels.gpu.reference import ops as reference
from moebox.kernels.gpu.triton import router


@dataclass(frozen=True)
class Spec:
    """A `RouterSpec`."""

    num_experts_per_tok: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5


CASES = {
    "k2": (384, Spec(8)),
    "tiny-k2": (64, Spec(6)),
    "odd": (15, Spec(4, norm_topk_prob=False)),
    "all": (5, Spec(5)),
    "one": (3, Spec(1, routed_scaling_factor=1.0)),
    "deepseek-v3": (256, Spec(8, n_group=8, topk_group=4)),
    "odd groups": (15, Spec(4, n_group=5, topk_group=3)),
    "one group of three": (15, Spec(4, n_group=3, topk_group=1, norm_topk_prob=False)),
    "groups of one": (15, Spec(6, n_group=15, topk_group=7)),
}


@pytest.fixture(params=CASES, name="case")
def _case(request, device):
    """Settings, logits of 5 tokens, and a bias that is negative in places."""
    n_experts, spec = CASES[request.param]
    logits = 2 * torch.randn(5, n_experts)
    return spec, logits.to(device), (torch.randn(n_experts) * 0.7).to(device)


@pytest.mark.slow
def test_route(case):
    spec, logits, bias = case
    ids, weights = router.route(logits, bias, spec)
    expected_ids, expected_weights = reference.route(logits, bias, spec)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)


def test_route_no_tokens(device):
    ids, weights = router.route(torch.empty(0, 15, device=device), torch.zeros(15, device=device), Spec(4))
    assert ids.shape == weights.shape == (0, 4)


def test_equal_scores_choose_different_experts(device):
    """The lower ids come first, and none twice."""
    logits, bias = torch.zeros(2, 70, device=device), torch.zeros(70, device=device)
    ids, _ = router.route(logits, bias, Spec(8))
    assert ids.tolist() == [list(range(8))] * 2


def test_nan_still_chooses_experts_that_there_are(device):
    """NaN logits, from a broken hidden state, still give ids of experts that exist."""
    logits = torch.full((1, 15), torch.nan, device=device)
    ids, _ = router.route(logits, torch.zeros(15, device=device), Spec(4))
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 7168])
def test_route_and_post(case, width, device):
    spec, logits, bias = case
    hidden = torch.randn(width).bfloat16().to(device)
    k = spec.num_experts_per_tok
    mailbox = [
        torch.full((2, k), -1, dtype=torch.int32),
        torch.full((2, k), -1.0),
        torch.zeros(2, width).bfloat16(),
    ]
    flags = torch.zeros(2, 16, dtype=torch.int32)
    if device.type == "cuda":
        mailbox, flags = [array.pin_memory() for array in mailbox], flags.pin_memory()
    before = [array[1].clone() for array in (*mailbox, flags)]
    router.route_and_post(logits[0], bias, spec, hidden, *(array[0] for array in mailbox), flags[0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    ids, weights = router.route(logits[:1], bias, spec)
    assert torch.equal(mailbox[0][0].long(), ids[0].cpu())
    assert torch.equal(mailbox[1][0], weights[0].cpu())
    assert torch.equal(mailbox[2][0], hidden.cpu())
    assert flags[0].tolist() == [1] + [0] * 15
    assert all(torch.equal(array[1], old) for array, old in zip((*mailbox, flags), before, strict=True))


def test_predict(case, device):
    """It writes the ids that the router would choose, and the flag, and nothing beside them."""
    spec, logits, bias = case
    ids = torch.full((3, spec.num_experts_per_tok), -1, dtype=torch.int32)
    flags = torch.zeros(3, 16, dtype=torch.int32)
    if device.type == "cuda":
        ids, flags = ids.pin_memory(), flags.pin_memory()
    router.predict(logits[1], bias, spec, ids[1], flags[1])
    if device.type == "cuda":
        torch.cuda.synchronize()
    expected, _ = reference.route(logits[1:2], bias, spec)
    assert torch.equal(ids[1].long(), expected[0].cpu())
    assert (ids[[0, 2]] == -1).all()
    assert flags.sum() == flags[1, 0] == 1
