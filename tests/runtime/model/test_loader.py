"""Loading refuses a tensor that is missing, unknown, or of a wrong shape or dtype, and names it."""

import pytest
import torch
from accelerate import init_empty_weights

from helpers.runtime import load_tensors, make_checkpoint, rewrite
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.engine import Engine
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.loader import load_backbone

Q_B = "model.layers.1.self_attn.q_b_proj.weight"
PACKED = "model.layers.2.mlp.experts.3.up_proj.weight_packed"


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model")


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as raised:
        Engine.load(folder)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", [Q_B, "model.norm.weight", PACKED])
def test_missing(folder, name):
    rewrite(folder, name, None)
    refused(folder, name, "no such tensor")


@pytest.mark.parametrize("name", [Q_B, PACKED])
def test_wrong_shape(folder, name):
    tensor = load_tensors(folder)[name]
    rewrite(folder, name, tensor[:-1])
    refused(
        folder, name, ".safetensors", str(list(tensor.shape)), str([tensor.shape[0] - 1, tensor.shape[1]])
    )


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [(Q_B, torch.float32, "F32"), (PACKED, torch.int64, "I64"), ("lm_head.weight", torch.float16, "F16")],
)
def test_wrong_dtype(folder, name, dtype, said):
    rewrite(folder, name, load_tensors(folder)[name].to(dtype))
    refused(folder, name, said, ".safetensors")


@pytest.mark.parametrize(
    "new_name",
    [
        "model.layers.1.self_attn.q_c_proj.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight_packed",
        "model.layers.1.mlp.experts.8.up_proj.weight_packed",
        "model.layers.1.mlp.experts.1.up_proj.weight_g_idx",
    ],
)
def test_leftover(folder, new_name):
    tensors = load_tensors(folder)
    rewrite(folder, "model.norm.weight", tensors["model.norm.weight"], new_name)
    refused(folder, new_name, "the model has no such tensor", ".safetensors")


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_an_unquantized_checkpoint_is_refused_with_the_command_that_quantizes_it(tmp_path, form):
    folder = synth(tmp_path / "plain", "tiny", format=form).folder
    refused(folder, "not quantized", f"moebox quantize {folder}")


def test_next_token_layer_is_left_out(tmp_path):
    folder = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    assert any(name.startswith("model.layers.3.") for name in load_tensors(folder))
    assert Engine.load(folder).logits([1, 2]).shape == (2, 512)


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_parameters_are_those_that_the_config_implies(tmp_path, q_lora_rank):
    config = Checkpoint.open(make_checkpoint(tmp_path / "model", q_lora_rank=q_lora_rank)).config
    with init_empty_weights():
        model = KimiK2(config, torch.bfloat16)
    shapes = config.backbone_shapes()
    for name, parameter in model.named_parameters():
        parts = [shapes.pop(source) for source in model.sources(name)]
        assert tuple(parameter.shape) == (sum(part[0] for part in parts), *parts[0][1:]), name
    assert not shapes


def test_loaded_values_and_types(folder):
    model = load_backbone(Checkpoint.open(folder), torch.bfloat16)
    tensors = load_tensors(folder)
    for name, parameter in model.named_parameters():
        expected = torch.cat([tensors[source].float() for source in model.sources(name)])
        assert torch.equal(parameter.float(), expected), name
        wide = "norm" in name or ".mlp.gate." in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert not parameter.requires_grad


def test_a_shard_that_shrinks_while_it_is_loaded(folder):
    checkpoint = Checkpoint.open(folder)
    shard = checkpoint.info("lm_head.weight").file
    with shard.open("r+b") as file:
        file.truncate(checkpoint.info("lm_head.weight").offset + 100)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .*: the file ends at byte \d+, its header"):
        load_backbone(checkpoint, torch.bfloat16)
    shard.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        load_backbone(checkpoint, torch.bfloat16)
