"""A folder that `moebox quantize` writes gives the same logits here and in transformers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.paths import TINY_K2
from helpers.runtime import PROJECTIONS, dequantize, load_tensors, reference_logits
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions

TOKENS = torch.randint(0, 500, (120,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=["random", "tiny-k2"])
def folder(request, tmp_path_factory):
    """Quantized from FP8. The random model picks all of its experts, so that rounding changes no pick."""
    tmp = tmp_path_factory.mktemp("output")
    source = TINY_K2
    if request.param == "random":
        overrides = {"n_routed_experts": 4}
        source = synth(tmp / "source", "tiny", format="fp8", config_overrides=overrides).folder
    quantize(source, tmp / "int4")
    return tmp / "int4"


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' model of the folder."""
    raw = json.loads((folder / "config.json").read_text())
    assert raw["quantization_config"]["format"] == "pack-quantized"
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model


@pytest.mark.slow
def test_same_weights(folder, theirs):
    tensors = load_tensors(folder)
    state = theirs.state_dict()
    for layer in range(theirs.config.first_k_dense_replace, theirs.config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts"
        for expert in (0, theirs.config.n_routed_experts - 1):
            gate, up, down = (
                dequantize(tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]).bfloat16()
                for name in (f"{stem}.{expert}.{part}" for part in PROJECTIONS)
            )
            assert torch.equal(state[f"{stem}.gate_up_proj"][expert], torch.cat([gate, up]))
            assert torch.equal(state[f"{stem}.down_proj"][expert], down)


def typical_error(logits, expected):
    """Median over tokens, because rounding may change a pick where two scores are nearly equal."""
    return ((logits - expected).norm(dim=1) / expected.norm(dim=1)).median()


@pytest.mark.slow
def test_same_logits_in_bf16(folder, theirs):
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0].float()
    for dtype in (torch.bfloat16, torch.float32):
        engine = Engine.load(folder, LoadOptions(dtype=dtype))
        assert typical_error(engine.logits(TOKENS), expected) <= 4e-2


@pytest.mark.slow
def test_same_logits_in_fp32(folder):
    expected = reference_logits(folder, TOKENS)
    engine = Engine.load(folder, LoadOptions(dtype=torch.float32))
    assert (engine.logits(TOKENS) - expected).abs().max() <= 1e-4
    session = engine.session()
    assert (session.prefill(TOKENS[:100]) - expected[99]).abs().max() <= 1e-4
    for position in range(100, 110):
        assert (session.decode(TOKENS[position]) - expected[position]).abs().max() <= 1e-4
    assert (session.prefill(TOKENS) - expected[-1]).abs().max() <= 1e-4
    assert session.reused == 110


@pytest.mark.slow
def test_bf16_is_nearer_to_fp32_than_transformers(folder, theirs):
    """Residual stream and sums are fp32 here, bf16 in transformers."""
    expected = reference_logits(folder, TOKENS)
    with torch.inference_mode():
        their_error = typical_error(theirs(torch.tensor([TOKENS])).logits[0].float(), expected)
    logits = Engine.load(folder, LoadOptions(dtype=torch.bfloat16)).logits(TOKENS)
    assert typical_error(logits, expected) < their_error
