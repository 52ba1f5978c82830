"""Every encoding gives the right values; a tensor that does not fit is an error that names it."""

from __future__ import annotations

import math
import re

import pytest
import torch

from helpers.int4 import expand_blocks, rewrite
from moebox.config import parse_config
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.encodings import FP8_QUANTIZATION, INT4_QUANTIZATION
from moebox.quantize.int4 import QuantError, dequantize, quantize_int4
from moebox.quantize.source.formats import (
    check_quantization,
    check_source,
    read_backbone,
    read_expert,
)
from moebox.quantize.source.inventory import classify, take_inventory
from moebox.quantize.synth.shapes import synth_config, synth_tensors
from moebox.quantize.synth.write import synth

CONFIG = parse_config(synth_config("tiny"))
EXPERT = "model.layers.1.mlp.experts.3"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def make(tmp_path):
    """Write a tiny checkpoint, changed by `edit`, and open it with its inventory."""

    def make(format="fp8", edit=None, **options):
        folder = tmp_path / "source"
        synth(folder, "tiny", format=format, **options)
        if edit is not None:
            rewrite(folder, edit)
        checkpoint = Checkpoint.open(folder)
        return checkpoint, take_inventory(checkpoint.tensors, checkpoint.config)

    return make


def refusal(make, edit, format="fp8", **options) -> str:
    """The message of the error with which reading all of a changed checkpoint fails."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint, inventory = make(format, edit, **options)
        for sources in inventory.experts.values():
            read_expert(sources, checkpoint.tensors)
        for source in inventory.backbone.values():
            read_backbone(source, checkpoint.tensors)
    return str(caught.value)


# ---- names ----


def test_expert_and_backbone_names_are_told_apart():
    role = classify(f"{EXPERT}.up_proj.weight_scale_inv", CONFIG)
    assert (role.kind, role.name, role.part) == ("expert", f"{EXPERT}.up_proj.weight", "weight_scale_inv")
    assert (role.layer, role.expert, role.projection) == (1, 3, "up_proj")
    role = classify(f"{KV_A}_scale_inv", CONFIG)
    assert (role.kind, role.name, role.part) == ("backbone", KV_A, "weight_scale_inv")
    assert classify(BIAS, CONFIG).kind == "backbone"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.up_proj.weight",  # a dense layer
        "model.layers.1.mlp.experts.8.up_proj.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.1.mlp.experts.0.up_proj.bias",
        "model.layers.1.input_layernorm.weight_scale_inv",
        "vision_tower.encoder.blocks.0.wqkv.weight",  # not in a model without vision
        "language_model.model.norm.weight",
        "transformer.h.0.attn.weight",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(CheckpointError, match=re.escape(name)):
        classify(name, CONFIG)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ("weight_zero_point", "asymmetric INT4"),
        ("weight_g_idx", "activation ordering"),
        ("qweight", "GPTQ"),
        ("input_scale", "static activation scales"),
        ("weight_global_scale", "NVFP4"),
    ],
)
def test_foreign_encodings_are_refused_by_name(part, what):
    for module in (f"{EXPERT}.up_proj", "model.layers.0.self_attn.o_proj"):
        with pytest.raises(CheckpointError, match=f"{re.escape(module)}.{part}: .*{what}"):
            classify(f"{module}.{part}", CONFIG)


@pytest.mark.slow
def test_the_inventory_of_kimi_k2_is_complete():
    raw = synth_config("kimi-k2")
    names = [tensor.name for tensor in synth_tensors(raw, "fp8")]
    inventory = take_inventory(names, parse_config(raw))
    assert len(inventory.experts) == 60 * 384
    assert inventory.left_out == {"*.rotary_emb.inv_freq": 61}
    parts = [source.parts for sources in inventory.experts.values() for source in sources]
    parts += [source.parts for source in inventory.backbone.values()]
    assert sum(map(len, parts)) == 139_644 - 61


def test_vision_is_left_out_and_the_prefix_stripped(make):
    checkpoint, inventory = make("int4", config_overrides={"model_type": "kimi_k25"})
    assert inventory.left_out == {"vision_tower.*": 1, "mm_projector.*": 1}
    assert next(iter(inventory.backbone)) == "model.embed_tokens.weight"
    source = inventory.experts[1, 3][0]
    assert source.name == f"{EXPERT}.gate_proj.weight"
    assert source.parts["weight_packed"] == f"language_model.{EXPERT}.gate_proj.weight_packed"
    assert read_backbone(inventory.backbone[KV_A], checkpoint.tensors).shape == (80, 160)


def test_the_next_token_layer_is_left_out(make):
    options = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    _, inventory = make(config_overrides=options)
    assert inventory.left_out["model.layers.3.*"] > 50
    assert max(layer for layer, _ in inventory.experts) == 2


def test_a_config_with_a_layer_too_few_is_no_next_token_layer():
    names = [tensor.name for tensor in synth_tensors(synth_config("tiny"), "fp8")]
    config = parse_config(synth_config("tiny", layers=2))
    with pytest.raises(CheckpointError, match=r"model.layers.2.\*: .*num_hidden_layers = 2"):
        take_inventory(names, config)


# ---- quantization_config ----


def test_quantization_configs_of_the_family_are_accepted():
    for quantization in (None, FP8_QUANTIZATION, INT4_QUANTIZATION):
        check_quantization({"quantization_config": quantization})
        check_quantization({"text_config": {"quantization_config": quantization}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 128}, "group_size = 128, moebox reads 32"),
        ({"num_bits": 8}, "num_bits = 8"),
        ({"symmetric": False}, "symmetric = False"),
        ({"strategy": "channel"}, "strategy = 'channel'"),
        ({"actorder": "group"}, "actorder = 'group'"),
    ],
)
def test_other_int4_settings_are_refused(changes, message):
    weights = INT4_QUANTIZATION["config_groups"]["group_0"]["weights"] | changes
    quantization = INT4_QUANTIZATION | {"config_groups": {"group_0": {"weights": weights}}}
    with pytest.raises(CheckpointError, match=message):
        check_quantization({"quantization_config": quantization})


def test_other_methods_are_refused():
    for quantization, message in (
        ({"quant_method": "gptq"}, "quant_method 'gptq'"),
        (FP8_QUANTIZATION | {"weight_block_size": [64, 64]}, r"weight_block_size = \[64, 64\]"),
        (INT4_QUANTIZATION | {"format": "mxfp4-pack-quantized"}, "format = 'mxfp4-pack-quantized'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_quantization({"quantization_config": quantization})


# ---- values ----


def test_an_fp8_expert_is_its_dequantized_weights_quantized(make):
    checkpoint, inventory = make()
    for source, matrix in zip(
        inventory.experts[1, 3], read_expert(inventory.experts[1, 3], checkpoint.tensors), strict=True
    ):
        weight, scale = (checkpoint.read(source.parts[part]) for part in ("weight", "weight_scale_inv"))
        expected = quantize_int4(weight.float() * expand_blocks(scale, weight.shape))
        assert torch.equal(matrix.packed, expected.packed)
        assert torch.equal(matrix.scale, expected.scale)
        assert matrix.error == expected.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_expert_is_quantized_from_its_own_precision(make, dtype):
    def edit(tensors):
        for name in tensors:
            if ".experts.3." in name:
                tensors[name] = (tensors[name].float() * 1.001).to(dtype)

    checkpoint, inventory = make("bf16", edit)
    (gate, *_) = read_expert(inventory.experts[1, 3], checkpoint.tensors, threads=2)
    expected = quantize_int4(checkpoint.read(f"{EXPERT}.gate_proj.weight").float())
    assert torch.equal(gate.packed, expected.packed)
    assert gate.error == expected.error


@pytest.mark.parametrize("shape_dtype", [torch.int32, torch.int64])
def test_native_int4_passes_bit_for_bit(make, shape_dtype):
    def edit(tensors):
        for name in tensors:
            if name.endswith("weight_shape"):
                tensors[name] = tensors[name].to(shape_dtype)

    checkpoint, inventory = make("int4", edit)
    for source, matrix in zip(
        inventory.experts[2, 0], read_expert(inventory.experts[2, 0], checkpoint.tensors), strict=True
    ):
        assert torch.equal(matrix.packed, checkpoint.read(source.parts["weight_packed"]))
        assert torch.equal(matrix.scale, checkpoint.read(source.parts["weight_scale"]))
        assert matrix.error == QuantError(0.0, 0.0, 0.0)
        assert matrix.error.rel_rms == 0


def test_backbone_fp8_becomes_bf16_with_partial_blocks(make):
    checkpoint, inventory = make()
    source = inventory.backbone[KV_A]
    assert check_source(source, checkpoint.tensors) == "fp8"
    weight, scale = checkpoint.read(KV_A), checkpoint.read(f"{KV_A}_scale_inv")
    assert (weight.shape, scale.shape) == ((80, 160), (1, 2))
    expected = (weight.float() * expand_blocks(scale, weight.shape)).bfloat16()
    assert torch.equal(read_backbone(source, checkpoint.tensors), expected)


def test_backbone_int4_becomes_bf16(make):
    def edit(tensors):
        matrix = quantize_int4(tensors.pop(KV_A))
        tensors[f"{KV_A}_packed"], tensors[f"{KV_A}_scale"] = matrix.packed, matrix.scale
        tensors[f"{KV_A}_shape"] = torch.tensor([80, 160])

    checkpoint, inventory = make("int4", edit)
    packed, scale = checkpoint.read(f"{KV_A}_packed"), checkpoint.read(f"{KV_A}_scale")
    assert torch.equal(read_backbone(inventory.backbone[KV_A], checkpoint.tensors), dequantize(packed, scale))


def test_the_router_becomes_bf16_and_its_bias_stays_f32(make):
    def edit(tensors):
        tensors[ROUTER] = tensors[ROUTER].float() * 1.001
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    checkpoint, inventory = make("bf16", edit)
    router = read_backbone(inventory.backbone[ROUTER], checkpoint.tensors)
    assert torch.equal(router, checkpoint.read(ROUTER).bfloat16())
    bias = read_backbone(inventory.backbone[BIAS], checkpoint.tensors)
    assert bias.dtype == torch.float32
    assert torch.equal(bias, checkpoint.read(BIAS))
    norm = read_backbone(inventory.backbone["model.norm.weight"], checkpoint.tensors)
    assert torch.equal(norm, checkpoint.read("model.norm.weight").bfloat16())


def test_the_layers_of_one_checkpoint_may_differ_in_encoding(make):
    def edit(tensors):
        name = f"{EXPERT}.down_proj.weight"
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].bfloat16()

    checkpoint, inventory = make("fp8", edit)
    encodings = [check_source(source, checkpoint.tensors) for source in inventory.experts[1, 3]]
    assert encodings == ["fp8", "fp8", "plain"]


# ---- refusals ----


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("name", [f"{EXPERT}.down_proj.weight", KV_A])
def test_a_missing_tensor_is_named(make, name, with_scale):
    def edit(tensors):
        del tensors[name]
        if with_scale:
            del tensors[f"{name}_scale_inv"]

    assert f"{name}: missing from the checkpoint" in refusal(make, edit)


@pytest.mark.parametrize("name", [f"{EXPERT}.up_proj.weight", KV_A])
def test_a_missing_fp8_scale_is_named(make, name):
    message = refusal(make, lambda tensors: tensors.pop(f"{name}_scale_inv"))
    assert f"{name}_scale_inv is missing" in message


@pytest.mark.parametrize("part", ["scale", "shape"])
def test_a_missing_int4_part_is_named(make, part):
    name = f"{EXPERT}.up_proj.weight_{part}"
    assert f"{name}: missing" in refusal(make, lambda tensors: tensors.pop(name), "int4")


def test_an_unknown_tensor_is_named(make):
    def edit(tensors):
        tensors["model.layers.1.surprise.weight"] = torch.zeros(2)

    assert "model.layers.1.surprise.weight: no tensor of the model" in refusal(make, edit)


@pytest.mark.parametrize(
    ("format", "name", "change", "message"),
    [
        ("fp8", f"{EXPERT}.up_proj.weight", lambda t: t[:32], "shape [32, 160] contradicts"),
        ("fp8", f"{KV_A}_scale_inv", lambda t: t[:, :1], "implies [1, 2]"),
        ("fp8", f"{KV_A}_scale_inv", lambda t: t.bfloat16(), "dtype BF16, expected F32"),
        ("fp8", "model.norm.weight", lambda t: t[:7], "shape [7] contradicts"),
        ("bf16", ROUTER, lambda t: t[:, 1:], "implies [8, 160]"),
        ("bf16", ROUTER, lambda t: t.double(), "dtype F64, expected BF16 or F16 or F32"),
        ("int4", f"{EXPERT}.up_proj.weight_packed", lambda t: t[:, :4], "shape [64, 4] contradicts"),
        ("int4", f"{EXPERT}.up_proj.weight_packed", lambda t: t.long(), "dtype I64, expected I32"),
        ("int4", f"{EXPERT}.up_proj.weight_scale", lambda t: t[:, ::5], "groups of 160 columns"),
        ("int4", f"{EXPERT}.up_proj.weight_scale", lambda t: t[1:], "shape [63, 5] contradicts"),
        ("int4", f"{EXPERT}.up_proj.weight_scale", lambda t: t.half(), "dtype F16, expected BF16"),
        ("int4", f"{EXPERT}.up_proj.weight_shape", lambda t: t.flip(0), "says [160, 64]"),
    ],
)
def test_a_tensor_that_contradicts_the_config_is_named_with_file_and_shapes(
    make, format, name, change, message
):
    def edit(tensors):
        tensors[name] = change(tensors[name])

    found = refusal(make, edit, format)
    assert f"model.safetensors: {name}: " in found
    assert message in found


def test_a_scale_beside_plain_weights_is_refused(make):
    def edit(tensors):
        tensors[f"{EXPERT}.up_proj.weight"] = tensors[f"{EXPERT}.up_proj.weight"].bfloat16()

    assert f"{EXPERT}.up_proj.weight: is BF16, but has a weight_scale_inv" in refusal(make, edit)


def test_two_encodings_of_one_tensor_are_refused(make):
    def edit(tensors):
        tensors[f"{EXPERT}.up_proj.weight"] = torch.zeros(64, 160, dtype=torch.bfloat16)

    message = refusal(make, edit, "int4")
    assert f"{EXPERT}.up_proj.weight: stands beside {EXPERT}.up_proj.weight_packed" in message


@pytest.mark.parametrize(
    ("format", "name", "position"),
    [
        ("fp8", f"{EXPERT}.up_proj.weight", (63, 159)),
        ("bf16", f"{EXPERT}.down_proj.weight", (159, 0)),
        ("fp8", f"{EXPERT}.up_proj.weight_scale_inv", (0, 1)),
        ("int4", f"{EXPERT}.up_proj.weight_scale", (5, 4)),
        ("fp8", KV_A, (79, 130)),
        ("bf16", KV_A, (0, 3)),
        ("fp8", BIAS, (2,)),
    ],
)
def test_nan_names_file_tensor_and_position(make, format, name, position):
    def edit(tensors):
        tensors[name][position] = math.nan

    assert f"model.safetensors: {name}: {list(position)} is nan" in refusal(make, edit, format)


def test_infinity_in_a_vector_names_its_position(make):
    def edit(tensors):
        tensors["model.norm.weight"][9] = -math.inf

    assert "model.norm.weight: [9] is -inf" in refusal(make, edit, "bf16")


def test_a_part_that_no_shard_holds_is_named(make):
    checkpoint, inventory = make()
    infos = dict(checkpoint.tensors)
    del infos[f"{EXPERT}.gate_proj.weight"]
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT}.gate_proj.weight: missing")):
        read_expert(inventory.experts[1, 3], infos)
