"""The CPU's experts against dequantized matrices, and the checks of where they lie."""

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers.offload.store import cpu_experts
from helpers.runtime import PROJECTIONS, dequantize, load_tensors, make_checkpoint, rewrite
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import MANIFEST_FILE
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.experts import group_by_expert
from moebox.quantize.convert import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def experts(folder):
    return cpu_experts(Checkpoint.open(folder))


def reference(folder, layer, ids, weights, hidden):
    tensors = load_tensors(folder)
    out = torch.zeros(hidden.shape)
    for token, (chosen, token_weights) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, weight in zip(chosen, token_weights, strict=True):
            gate, up, down = (
                dequantize(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"])
                for name in (f"model.layers.{layer}.mlp.experts.{expert}.{part}" for part in PROJECTIONS)
            )
            x = hidden[token].float()
            out[token] += weight * (down @ (F.silu(gate @ x) * (up @ x)))
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("layer", [1, 2])
def test_equals_dequantized(folder, experts, layer, count, dtype, tolerance):
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 160, generator=generator).to(dtype)
    ids = torch.rand(count, 8, generator=generator).topk(4).indices
    weights = torch.rand(count, 4, generator=generator)
    out = experts.forward(layer, ids, weights, hidden)
    expected = reference(folder, layer, ids, weights, hidden)
    assert out.dtype == torch.float32
    assert (out - expected).norm() <= tolerance * expected.norm()


def test_same_bits_every_time(experts):
    hidden = torch.randn(30, 160).bfloat16()
    ids = torch.rand(30, 8).topk(4).indices
    weights = torch.rand(30, 4)
    first = experts.forward(1, ids, weights, hidden)
    assert all(torch.equal(experts.forward(1, ids, weights, hidden), first) for _ in range(5))


def routings(top_k):
    """Lists of `top_k` distinct experts of 8, one list a token."""
    return st.lists(st.permutations(range(8)).map(lambda order: order[:top_k]), min_size=1, max_size=9)


@given(st.integers(1, 6).flatmap(routings))
def test_groups_hold_every_pair_once(rows):
    ids = np.array(rows, np.int64)
    chosen, offsets, tokens, order = group_by_expert(ids)
    assert chosen == sorted(set(ids.flat))
    assert offsets.dtype == tokens.dtype == np.int32
    assert offsets[0] == 0
    assert offsets[-1] == ids.size == len(tokens)
    for expert, begin, end in zip(chosen, offsets[:-1], offsets[1:], strict=True):
        assert tokens[begin:end].tolist() == np.nonzero(ids == expert)[0].tolist()
        assert set(ids.flat[order[begin:end]]) == {expert}


def test_bytes(experts, folder):
    tensors = load_tensors(folder)
    stored = sum(t.nbytes for name, t in tensors.items() if name.endswith(("_packed", "_scale")))
    assert experts.nbytes == stored


def test_scale_of_wrong_type(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    name = "model.layers.1.mlp.experts.0.down_proj.weight_scale"
    rewrite(folder, name, load_tensors(folder)[name].half())
    with pytest.raises(CheckpointError, match=r"F16.*implies BF16"):
        cpu_experts(Checkpoint.open(folder))


@pytest.fixture
def written_by_moebox(folder, tmp_path):
    """The same experts in moebox's layout."""
    quantize(folder, tmp_path / "int4")
    return tmp_path / "int4"


def edit_extent(folder, **changes):
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["experts"]["2"][3] |= changes
    path.write_text(json.dumps(manifest))


def test_both_layouts_give_the_same_bits(experts, written_by_moebox, caplog):
    with caplog.at_level(logging.WARNING, "moebox"):
        own = cpu_experts(Checkpoint.open(written_by_moebox))
    assert "six reads" not in caplog.text
    hidden = torch.randn(7, 160).bfloat16()
    ids = torch.rand(7, 8).topk(4).indices
    weights = torch.rand(7, 4)
    for layer in (1, 2):
        expected = experts.forward(layer, ids, weights, hidden)
        assert torch.equal(own.forward(layer, ids, weights, hidden), expected)


def test_manifest_of_other_shards(written_by_moebox):
    edit_extent(written_by_moebox, offset=4096)
    with pytest.raises(CheckpointError, match=r"experts\.3\.gate_proj.*moebox\.json says .* byte 4096"):
        cpu_experts(Checkpoint.open(written_by_moebox))


def test_manifest_beyond_the_file(written_by_moebox):
    edit_extent(written_by_moebox, offset=1 << 40)
    with pytest.raises(CheckpointError, match=r"experts\.3: ends at byte"):
        cpu_experts(Checkpoint.open(written_by_moebox))
