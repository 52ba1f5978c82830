"""The conversion: layout, config, manifest; the output's bytes depend on the source alone."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import moebox
from helpers.convert import SHARD_BYTES, contents, make_source, weights_map
from moebox.config import load_config
from moebox.errors import CheckpointError, ConfigError, PlanError
from moebox.offload.checkpoint.layout import EXPERT_TENSORS, ExpertLayout, load_manifest
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.quantize.convert import quantize
from moebox.quantize.dryrun import plan
from moebox.quantize.encodings import INT4_QUANTIZATION
from moebox.quantize.int4 import dequantize
from moebox.quantize.output.shards import plan_shards
from moebox.quantize.pipeline import PIECE_BYTES
from moebox.quantize.source.formats import read_backbone
from moebox.quantize.source.inventory import take_inventory
from moebox.quantize.synth.shapes import synth_config
from moebox.units import PAGE_BYTES


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "fp8")


@pytest.fixture(scope="module")
def converted(fp8, tmp_path_factory):
    dst = tmp_path_factory.mktemp("output") / "int4"
    return dst, quantize(fp8, dst, shard_bytes=SHARD_BYTES)


def test_every_tensor_is_there_with_the_names_and_types_of_the_format(converted):
    dst, _ = converted
    config = load_config(dst)
    expected = dict.fromkeys(config.backbone_shapes(), "BF16")
    for layer in config.moe_layers:
        expected[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = "F32"
        for expert in range(config.n_routed_experts):
            name = config.expert_name(layer, expert)
            for projection in config.expert_shapes():
                expected |= {
                    f"{name}.{projection}.weight_packed": "I32",
                    f"{name}.{projection}.weight_scale": "BF16",
                    f"{name}.{projection}.weight_shape": "I32",
                }
    found = {}
    for file in sorted(dst.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_slice(name).get_dtype() for name in shard.keys()}  # noqa: SIM118
            assert weights_map(dst).items() >= dict.fromkeys(shard.keys(), file.name).items()
    assert found == expected
    assert set(weights_map(dst)) == set(expected)


def test_experts_are_contiguous_and_where_the_manifest_says(converted):
    dst, _ = converted
    checkpoint, manifest = Checkpoint.open(dst), load_manifest(dst)
    layout = ExpertLayout(checkpoint.config)
    for layer, extents in manifest.experts.items():
        for expert, extent in enumerate(extents):
            name = checkpoint.config.expert_name(layer, expert)
            infos = [checkpoint.info(f"{name}.{suffix}") for suffix in EXPERT_TENSORS]
            assert {info.file.name for info in infos} == {extent.file}
            assert [info.offset - extent.offset for info in infos] == layout.offsets
            assert extent.nbytes == layout.nbytes
    starts = {
        file: min(info.offset for info in checkpoint.tensors.values() if info.file.name == file)
        for file in manifest.shards
    }
    assert len(starts) > 4
    assert all(start % PAGE_BYTES == 0 for start in starts.values())


@pytest.mark.slow
def test_k2_shards_hold_a_few_gigabytes_and_page_aligned_experts():
    from moebox.config import parse_config

    config = parse_config(synth_config("kimi-k2", layers=None, experts=None, format="fp8", overrides=None))
    shards = plan_shards(config)
    assert config.expert_bytes == 24_772_608
    assert all(shard.data_bytes < 4_000_000_000 for shard in shards)
    assert sum(len(shard.experts) for shard in shards) == 60 * 384
    assert {shard.expert_offset(7) % PAGE_BYTES for shard in shards if shard.experts} == {0}
    assert sum(shard.size for shard in shards) == pytest.approx(594e9, rel=0.01)


def test_backbone_equals_the_dequantized_source(fp8, converted):
    dst, _ = converted
    source = Checkpoint.open(fp8)
    inventory = take_inventory(source.tensors, source.config)
    output = {name: Checkpoint.open(dst).read(name) for name in inventory.backbone}
    for name, tensor in inventory.backbone.items():
        assert torch.equal(output[name], read_backbone(tensor, source.tensors)), name


def test_recorded_errors_are_those_of_the_stored_weights(fp8, converted):
    dst, result = converted
    source, output, manifest = Checkpoint.open(fp8), Checkpoint.open(dst), load_manifest(dst)
    squares = sum_squares = largest = 0.0
    for projection in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.3.{projection}"
        blocks = source.read(f"{name}.weight_scale_inv").repeat_interleave(128, 0).repeat_interleave(128, 1)
        weight = source.read(f"{name}.weight").float()
        weight *= blocks[: weight.shape[0], : weight.shape[1]]
        packed, scale = output.read(f"{name}.weight_packed"), output.read(f"{name}.weight_scale")
        assert output.read(f"{name}.weight_shape").tolist() == list(weight.shape)
        error = dequantize(packed, scale, torch.float32) - weight
        squares += float(error.double().square().sum())
        sum_squares += float(weight.double().square().sum())
        largest = max(largest, float(error.abs().max()))
    extent = manifest.experts[1][3]
    assert extent.rel_rms == pytest.approx((squares / sum_squares) ** 0.5, rel=1e-4)
    assert extent.max_abs == pytest.approx(largest, rel=1e-4)
    assert 0.05 < result.rel_rms < 0.12


@pytest.mark.parametrize("workers", [1, 5])
def test_bytes_do_not_depend_on_workers_or_folder(fp8, converted, tmp_path, workers):
    dst, _ = converted
    other = tmp_path / "elsewhere" / "deep"
    quantize(fp8, other, workers=workers, shard_bytes=SHARD_BYTES)
    assert contents(other) == contents(dst)


def test_large_matrices_are_converted_in_pieces_with_the_same_bytes(fp8, converted, tmp_path, monkeypatch):
    assert PIECE_BYTES >= 1 << 20
    monkeypatch.setattr("moebox.quantize.pipeline.PIECE_BYTES", 10_000)
    quantize(fp8, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert contents(tmp_path / "out") == contents(converted[0])


def test_small_files(fp8, converted):
    dst, result = converted
    copied = (
        "tiktoken.model",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    )
    for name in copied:
        assert (dst / name).read_bytes() == (fp8 / name).read_bytes()
    assert not (dst / "README.md").exists()
    assert not (dst / "modeling_deepseek.py").exists()
    assert not (dst / ".moebox").exists()
    assert "*.rotary_emb.inv_freq (4)" in result.left_out
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (fp8, dst))
    assert after.pop("quantization_config") == INT4_QUANTIZATION
    assert before.pop("quantization_config")["quant_method"] == "fp8"
    before.pop("auto_map", None)
    assert (before.pop("model_type"), after.pop("model_type")) == ("kimi_k2", "deepseek_v3")
    assert after == before


def test_single_file_checkpoint_without_index(fp8, tmp_path, converted):
    source = tmp_path / "fp8"
    make_source(source, shard_bytes=1 << 30)
    (only,) = source.glob("*.safetensors")
    only.rename(source / "model.safetensors")
    (source / "model.safetensors.index.json").unlink()
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    ours, theirs = contents(tmp_path / "out"), contents(converted[0])
    ours.pop("moebox.json"), theirs.pop("moebox.json")
    assert ours == theirs


def test_int4_passes_through_bit_for_bit(tmp_path):
    source = make_source(tmp_path / "native", "int4")
    result = quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert result.method == load_manifest(tmp_path / "out").method == "passthrough"
    assert result.rel_rms == 0
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert set(before.tensors) == set(after.tensors)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.tensors)


def test_k25_becomes_a_flat_text_model(tmp_path, caplog):
    source = make_source(tmp_path / "k25", "int4", config_overrides={"model_type": "kimi_k25"})
    result = quantize(source, tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["model_type"] == "deepseek_v3"
    assert raw["architectures"] == ["DeepseekV3ForCausalLM"]
    assert "text_config" not in raw and "vision_config" not in raw
    assert raw["quantization_config"] == INT4_QUANTIZATION
    names = weights_map(tmp_path / "out")
    assert "lm_head.weight" in names
    assert not [
        name for name in names if name.startswith(("language_model.", "vision_tower", "mm_projector"))
    ]
    assert any(entry.startswith("vision_tower.*") for entry in result.left_out)
    assert "vision_tower.*" in caplog.text
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(before.read(f"language_model.{name}"), after.read(name)) for name in after.tensors)


@pytest.mark.parametrize("format", ["bf16", "F16", "F32"])
def test_plain_sources(tmp_path, format):
    from safetensors.torch import save_file

    source = make_source(tmp_path / "plain", "bf16")
    if format != "bf16":
        dtype = {"F16": torch.float16, "F32": torch.float32}[format]
        for file in source.glob("*.safetensors"):
            tensors = load_file(file)
            save_file({n: t if "bias" in n else t.to(dtype) for n, t in tensors.items()}, file)
    result = quantize(source, tmp_path / "out")
    assert 0.05 < result.rel_rms < 0.12
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))["lm_head.weight"].dtype == torch.bfloat16


def test_package_is_callable(fp8, tmp_path):
    assert moebox.quantize.__name__ == "moebox.quantize"
    result = moebox.quantize(fp8, tmp_path / "out", workers=1)
    assert result.folder == tmp_path / "out"
    assert json.dumps(result.to_dict())


def test_running_again_does_nothing(fp8, converted):
    dst, first = converted
    before = {path: path.stat().st_mtime_ns for path in dst.iterdir()}
    again = quantize(fp8, dst, shard_bytes=SHARD_BYTES)
    assert again.shards_resumed == again.shards == first.shards
    assert {path: path.stat().st_mtime_ns for path in dst.iterdir()} == before


def test_other_architectures_are_refused_by_name(fp8, tmp_path):
    source = make_source(tmp_path / "k3")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"model_type": "kimi_k3"}))
    with pytest.raises(ConfigError, match="kimi_k3"):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(fp8, tmp_path):
    with pytest.raises(PlanError, match="awq"):
        quantize(fp8, tmp_path / "out", method="awq")
    with pytest.raises(PlanError, match="workers = 0"):
        quantize(fp8, tmp_path / "out", workers=0)
    with pytest.raises(CheckpointError, match="no such folder"):
        quantize(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plan_reports_what_the_conversion_then_does(fp8, converted, tmp_path):
    dst, result = converted
    report = plan(fp8, tmp_path / "out", shard_bytes=SHARD_BYTES)
    assert not (tmp_path / "out").exists()
    assert (
        report.output_bytes == result.output_bytes == sum(p.stat().st_size for p in dst.glob("*.safetensors"))
    )
    assert report.shards == result.shards
    assert report.experts_bytes == load_config(dst).experts_bytes
    assert sum(report.kept_bf16.values()) == report.backbone_bytes
    assert {"attention", "shared experts", "routers"} <= set(report.kept_bf16)
    assert report.fits
    assert report.seconds > 0
    assert report.left_out == list(result.left_out)
    assert json.dumps(report.to_dict())


def test_a_disk_too_small_is_refused_before_the_first_byte(fp8, tmp_path, monkeypatch):
    monkeypatch.setattr("moebox.quantize.prepare.free_bytes", lambda _: 1_000_000)
    with pytest.raises(PlanError, match=r"GB needed, 0\.00 GB free"):
        quantize(fp8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_at_odd_offsets(fp8, converted, tmp_path):
    """Behind a header of odd length no tensor is aligned, so each is copied when it is read."""
    import struct

    source = make_source(tmp_path / "fp8")
    for file in source.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        padding = b" " * (1 + length % 2)
        file.write_bytes(
            struct.pack("<Q", length + len(padding)) + data[8 : 8 + length] + padding + data[8 + length :]
        )
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES)
    ours, theirs = contents(tmp_path / "out"), contents(converted[0])
    ours.pop("moebox.json"), theirs.pop("moebox.json")
    assert ours == theirs


def test_retrained_source_of_the_same_shape_is_noticed(tmp_path):
    source, dst = make_source(tmp_path / "fp8"), tmp_path / "out"
    quantize(source, dst)
    for path in source.iterdir():
        path.unlink()
    source.rmdir()
    make_source(source, seed=1)
    with pytest.raises(CheckpointError, match="was another file then"):
        quantize(source, dst)
    assert quantize(source, dst, resume=False).shards == 1
