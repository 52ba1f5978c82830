"""The training model computes what transformers computes, and survives its export."""

import json
from types import SimpleNamespace

import pytest
import torch

from helpers.tiny_k2 import MICRO, micro_config


@pytest.fixture
def model():
    from model import Model

    torch.manual_seed(0)
    model = Model(SimpleNamespace(**micro_config()))
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(std=0.1)
    return model


def reference(weights):
    import transformers

    config = micro_config() | {"model_type": "deepseek_v3"}
    config.pop("quantization_config")
    config = transformers.DeepseekV3Config(**config)
    config._attn_implementation = "eager"
    theirs = transformers.DeepseekV3ForCausalLM(config).float().eval()
    state = {}
    for name, weight in weights.items():
        if name.endswith("mlp.experts.gate_proj"):
            up = weights[name.replace("gate_proj", "up_proj")]
            state[name.replace("gate_proj", "gate_up_proj")] = torch.cat([weight, up], 1)
        elif not name.endswith("mlp.experts.up_proj"):
            state[name] = weight
    theirs.load_state_dict(state)
    return theirs


def test_logits_equal_transformers(model):
    from model import Documents

    tokens = torch.randint(0, MICRO["vocab_size"], (40,))
    starts = torch.tensor([0, 25, 40], dtype=torch.int32)
    theirs = reference(model.state_dict())
    with torch.no_grad():
        ours = model(tokens, Documents.of(starts))
        for begin, end in ((0, 25), (25, 40)):
            expected = theirs(tokens[None, begin:end]).logits[0]
            assert (ours[begin:end] - expected).abs().max() < 1e-4
            assert expected.std() > 0.1


def test_gradients_reach_every_weight(model):
    from model import Documents

    tokens = torch.randint(0, MICRO["vocab_size"], (64,))
    model(tokens, Documents.of(torch.tensor([0, 64], dtype=torch.int32))).float().logsumexp(
        -1
    ).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_export_keeps_weights_within_fp8(model, tmp_path):
    from export import load_parts, save_parts, write
    from quant import from_fp8, round_int4
    from safetensors.torch import load_file

    save_parts(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(micro_config()))
    write(load_parts(tmp_path), tmp_path, MICRO["num_hidden_layers"])
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    saved = {name: load_file(tmp_path / file)[name] for name, file in files.items()}
    for name, weight in model.state_dict().items():
        if ".experts." in name:
            for expert, matrix in enumerate(round_int4(weight.bfloat16())):
                key = name.replace(".experts.", f".experts.{expert}.") + ".weight"
                assert_fp8(saved, key, matrix, from_fp8)
        elif f"{name}_scale_inv" in saved:
            assert_fp8(saved, name, weight, from_fp8)
        elif name.endswith("bias"):
            assert torch.equal(saved[name], weight)
        else:
            assert torch.equal(saved[name], weight.bfloat16())


def assert_fp8(saved, name, weight, from_fp8):
    values, scale = saved[name], saved[f"{name}_scale_inv"]
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert list(scale.shape) == [-(-size // 128) for size in weight.shape]
    error = (from_fp8(values, scale) - weight).norm() / weight.norm()
    assert error < 0.04


def test_int4_grid_survives_fp8():
    from quant import from_fp8, round_int4, to_fp8

    weight = torch.randn(64, 256) * 0.05
    once = round_int4(weight)
    assert (once - weight).norm() / weight.norm() < 0.12
    again = round_int4(from_fp8(*to_fp8(once)))
    assert (again - once).norm() / once.norm() < 0.03


def test_quantized_gives_the_weights_back(model):
    from quant import quantized

    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with quantized(model):
        assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
