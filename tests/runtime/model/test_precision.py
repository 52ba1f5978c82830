"""int8 and nf4 backbones are close to bf16, and as much smaller as reported."""

import pytest
import torch

from helpers.runtime import make_checkpoint
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model.precision import PRECISIONS, is_quantized, parameter_bytes, planned_bytes
from moebox.runtime.model.quantized_linear import quantize_linear

TOKENS = torch.randint(0, 512, (50,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All widths are multiples of 64, and all experts are picked, so that rounding changes no pick."""
    return make_checkpoint(
        tmp_path_factory.mktemp("backbone") / "model",
        hidden_size=192,
        intermediate_size=256,
        n_routed_experts=4,
    )


@pytest.fixture(scope="module")
def plain(folder):
    return Engine.load(folder, LoadOptions(dtype=torch.bfloat16))


@pytest.mark.parametrize(("backbone", "tolerance"), [("int8", 0.1), ("nf4", 0.7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_close_to_bf16(folder, plain, backbone, tolerance, dtype):
    expected = plain.logits(TOKENS)
    engine = Engine.load(folder, LoadOptions(backbone=backbone, dtype=dtype))
    error = (engine.logits(TOKENS) - expected).norm() / expected.norm()
    assert 1e-4 < error < tolerance


@pytest.mark.parametrize(("backbone", "at_least"), [("int8", 0.35), ("nf4", 0.5)])
def test_saved_bytes_are_as_reported(folder, plain, backbone, at_least):
    engine = Engine.load(folder, LoadOptions(backbone=backbone, dtype=torch.bfloat16))
    assert plain.backbone_saved_bytes == 0
    assert engine.backbone_bytes + engine.backbone_saved_bytes == plain.backbone_bytes
    assert engine.backbone_saved_bytes > at_least * (plain.backbone_bytes - 512 * 192 * 2)


@pytest.mark.parametrize("backbone", PRECISIONS)
def test_planned_bytes_are_those_that_loading_takes(folder, backbone):
    engine = Engine.load(folder, LoadOptions(backbone=backbone, dtype=torch.bfloat16))
    planned = planned_bytes(engine.config.backbone_shapes(), torch.bfloat16, backbone)
    assert planned == pytest.approx(engine.backbone_bytes, rel=0.02)


def test_nf4_takes_only_what_bitsandbytes_multiplies_on_every_cpu():
    assert is_quantized("model.layers.0.self_attn.o_proj", (64, 128), "nf4")
    assert not is_quantized("model.layers.0.self_attn.o_proj", (64, 96), "nf4")
    assert not is_quantized("model.layers.0.self_attn.o_proj", (80, 128), "nf4")
    assert is_quantized("model.layers.0.self_attn.o_proj", (80, 96), "int8")
    assert not is_quantized("model.layers.0.mlp.gate", (64, 128), "int8")


def test_narrow_rows_stay_bf16_under_nf4(tmp_path):
    """bitsandbytes 0.50 computes wrong products on the CPU where nf4 rows are no multiple of 64."""
    engine = Engine.load(make_checkpoint(tmp_path / "model"), LoadOptions(backbone="nf4"))  # hidden_size 160
    layer = engine.runner.model.model.layers[0]
    assert layer.self_attn.q_kv_a_proj.weight.dtype == torch.bfloat16
    assert layer.self_attn.q_b_proj.weight.dtype == torch.uint8


@pytest.mark.parametrize(("backbone", "bytes_per_weight"), [("int8", 1.0), ("nf4", 0.52)])
def test_one_matrix(backbone, bytes_per_weight):
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    module = quantize_linear(weight, backbone)
    x = torch.randn(5, 256).bfloat16()
    expected = x.float() @ weight.float().T
    assert module(x).dtype == torch.bfloat16
    assert (module(x).float() - expected).norm() / expected.norm() < (0.02 if backbone == "int8" else 0.12)
    assert parameter_bytes(module.weight) == pytest.approx(bytes_per_weight * weight.numel(), rel=0.05)
