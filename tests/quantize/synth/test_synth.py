"""Synthetic checkpoints: the tensors of the true ones, finite values, and nothing left after a failure."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors import safe_open

from moebox.config import load_config, parse_config
from moebox.errors import CheckpointError, ConfigError, PlanError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.int4 import dequantize, to_bfloat16
from moebox.quantize.source.formats import check_quantization, check_source
from moebox.quantize.source.inventory import take_inventory
from moebox.quantize.synth import write as synth_module
from moebox.quantize.synth.shapes import synth_config, synth_tensors
from moebox.quantize.synth.write import synth

FORMATS = ("fp8", "bf16", "int4")


@pytest.mark.slow
def test_fp8_inventory_is_that_of_kimi_k2_instruct():
    tensors = synth_tensors(synth_config("kimi-k2", format="fp8"), "fp8")
    assert len(tensors) == 139_644
    files = sum(tensor.nbytes + 136 for tensor in tensors)  # 136: an entry in a header
    assert files == pytest.approx(958.51 * 2**30, rel=1e-5)
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    attention = "model.layers.60.self_attn"
    assert found[f"{attention}.kv_a_proj_with_mqa.weight"] == ("F8_E4M3", (576, 7168))
    assert found[f"{attention}.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    assert found[f"{attention}.rotary_emb.inv_freq"] == ("BF16", (56,))
    assert found["model.layers.0.mlp.down_proj.weight_scale_inv"] == ("F32", (56, 144))
    assert found["model.layers.1.mlp.gate.weight"] == ("BF16", (384, 7168))
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"] == ("F32", (384,))
    assert found["lm_head.weight"] == ("BF16", (163_840, 7168))


@pytest.mark.slow
def test_int4_inventory_is_that_of_kimi_k2_thinking():
    tensors = synth_tensors(synth_config("kimi-k2", format="int4"), "int4")
    assert len(tensors) == 208_215
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    expert = "model.layers.60.mlp.experts.383"
    assert found[f"{expert}.down_proj.weight_packed"] == ("I32", (7168, 256))
    assert found[f"{expert}.down_proj.weight_scale"] == ("BF16", (7168, 64))
    assert found[f"{expert}.gate_proj.weight_shape"] == ("I32", (2,))
    packed = sum(tensor.nbytes for tensor in tensors if ".experts." in tensor.name)
    assert packed == pytest.approx(531.6 * 2**30, rel=1e-4)
    assert not any("weight_scale_inv" in name or "inv_freq" in name for name in found)


def test_kimi_k25_gets_prefix_nesting_and_vision_tensors():
    raw = synth_config("tiny", format="int4", overrides={"model_type": "kimi_k25"})
    assert raw["text_config"]["model_type"] == "kimi_k2"
    assert raw["quantization_config"] == raw["text_config"]["quantization_config"]
    assert parse_config(raw).prefix == "language_model."
    prefixes = Counter(tensor.name.partition(".")[0] for tensor in synth_tensors(raw, "int4"))
    text = len(synth_tensors(synth_config("tiny", format="int4"), "int4"))
    assert prefixes == {"language_model": text, "vision_tower": 1, "mm_projector": 1}


def test_deepseek_layers_and_next_token_prediction():
    overrides = {
        "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 2,
        "q_lora_rank": None,
    }
    tensors = {tensor.name for tensor in synth_tensors(synth_config("tiny", overrides=overrides), "fp8")}
    assert "model.layers.1.mlp.gate_proj.weight" in tensors
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" in tensors
    assert {"model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.7.up_proj.weight"} <= tensors
    assert "model.layers.0.self_attn.q_proj.weight_scale_inv" in tensors


@pytest.mark.parametrize("format", FORMATS)
def test_a_tiny_checkpoint_is_valid(tmp_path, format):
    calls = []
    result = synth(
        tmp_path / "tiny",
        "tiny",
        format=format,
        shard_bytes=300_000,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1] == (result.nbytes, result.nbytes)
    assert len(result.files) > 3
    pattern = "model-1-of-" if format == "fp8" else "model-00001-of-0000"
    assert result.files[0].startswith(pattern)
    checkpoint = Checkpoint.open(tmp_path / "tiny")
    assert len(checkpoint.tensors) == result.tensors
    index = json.loads((tmp_path / "tiny/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == result.nbytes
    check_quantization(json.loads((tmp_path / "tiny/config.json").read_text()))
    inventory = take_inventory(checkpoint.tensors, checkpoint.config)
    encodings = {check_source(source, checkpoint.tensors) for source in inventory.experts[2, 7]}
    assert encodings == {"plain" if format == "bf16" else format}
    for source in inventory.backbone.values():
        check_source(source, checkpoint.tensors)
    assert result.to_dict()["tensors"] == result.tensors
    assert f"{result.tensors} tensors" in result.render()


@pytest.mark.parametrize("format", FORMATS)
def test_values_are_finite_and_of_a_sensible_size(tmp_path, format):
    synth(tmp_path, "tiny", format=format)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        assert all(tensors.get_tensor(name).float().isfinite().all() for name in names)
        matrix = {
            name.rpartition(".")[2]: tensors.get_tensor(name) for name in names if "s.5.up_proj" in name
        }
        norm = tensors.get_tensor("model.norm.weight").float()
        bias = tensors.get_tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert torch.equal(
            tensors.get_tensor("model.layers.1.input_layernorm.weight").float().round(), 0 * norm + 1
        )
    if format == "fp8":
        dense = to_bfloat16(matrix["weight"], matrix["weight_scale_inv"])
    elif format == "int4":
        dense = dequantize(matrix["weight_packed"], matrix["weight_scale"])
    else:
        dense = matrix["weight"]
    assert dense.shape == (64, 160)
    assert dense.float().std().item() == pytest.approx(160**-0.5, rel=0.5)
    assert norm.mean().item() == pytest.approx(1, abs=0.02)
    assert 0 < bias.abs().max() < 0.1


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synth(tmp_path / name, "tiny", seed=seed)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert folder_bytes(tmp_path / "a") != folder_bytes(tmp_path / "c")


@pytest.mark.parametrize("format", FORMATS)
def test_experts_differ_although_the_pool_repeats(tmp_path, monkeypatch, format):
    monkeypatch.setattr(synth_module, "POOL_BYTES", 1 << 14)
    monkeypatch.setattr(synth_module, "_CHUNK_BYTES", 1 << 12)
    synth(tmp_path, "tiny", experts=64, format=format)
    checkpoint = Checkpoint.open(tmp_path)
    part = "weight_packed" if format == "int4" else "weight"
    names = [name for name in checkpoint.tensors if ".experts." in name and name.endswith(f".{part}")]
    contents = {checkpoint.read(name).view(torch.uint8).numpy().tobytes() for name in names}
    assert len(contents) == len(names) == 64 * 2 * 3


def test_layers_experts_and_overrides_reach_the_config(tmp_path):
    synth(tmp_path, "tiny", layers=2, experts=3, config_overrides={"rms_norm_eps": 1e-5})
    config = load_config(tmp_path)
    assert (config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok) == (2, 3, 3)
    assert config.rms_norm_eps == 1e-5


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        synth(tmp_path, "tiny")
    assert folder_bytes(tmp_path) == {"mine": b"keep"}


def test_too_small_a_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**9})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(PlanError, match=r"takes 22\.\d GB, the disk has 1\.0 GB free"):
        synth(tmp_path / "new", "kimi-k2", layers=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing_behind(tmp_path, failure):
    def fail(done, total):
        if done > total // 2:
            raise failure

    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        synth(tmp_path / "new", "tiny", shard_bytes=200_000, progress=fail)
    if isinstance(failure, OSError):
        assert "No space left on device" in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_destination_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")  # unlike permissions, this stops root, too
    with pytest.raises(CheckpointError, match=r"file/new: cannot be written"):
        synth(tmp_path / "file" / "new", "tiny")


def test_arguments_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="layers = 1 leaves no layer with experts"):
        synth_config("tiny", layers=1)
    with pytest.raises(ConfigError, match="shape 'huge'"):
        synth_config("huge")
    with pytest.raises(ConfigError, match="format 'int3'"):
        synth_config("tiny", format="int3")
    with pytest.raises(ConfigError, match="n_group"):
        synth_config("tiny", experts=9, overrides={"n_group": 4})
