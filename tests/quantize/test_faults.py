"""Bad input and bad disks: one message that names file and tensor, and no output that looks complete."""

import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.convert import SHARD_BYTES, contents, make_source, start, weights_map
from moebox.errors import CheckpointError, ConfigError, PlanError
from moebox.quantize.convert import quantize

EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "fp8")


def refused(source, dst, match, error=CheckpointError):
    """Check that the conversion fails and leaves nothing that looks complete; return its message."""
    with pytest.raises(error, match=match) as caught:
        quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert not (dst / "moebox.json").exists()
    assert not (dst / "model.safetensors.index.json").exists()
    assert not list((dst / ".moebox").glob("*.partial"))
    return str(caught.value)


def home(source, name):
    return source / weights_map(source)[name]


def edit_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_truncated_shard(source, tmp_path):
    path = home(source, EXPERT)
    path.write_bytes(path.read_bytes()[:-100])
    refused(source, tmp_path / "out", rf"{path.name}: .*ends at byte")
    assert not (tmp_path / "out").exists()


def test_header_with_wrong_offsets(source, tmp_path):
    def shift(header):
        header[EXPERT]["data_offsets"] = [offset + 32 for offset in header[EXPERT]["data_offsets"]]

    path = home(source, EXPERT)
    edit_header(path, shift)
    refused(source, tmp_path / "out", rf"{path.name}: .*(overlaps|leaves a hole)")
    assert not (tmp_path / "out").exists()


def test_missing_shard(source, tmp_path):
    path = home(source, EXPERT)
    path.unlink()
    refused(source, tmp_path / "out", rf"{path.name}: no such file\nFetch the missing shard")


def test_missing_scale(source, tmp_path):
    path = home(source, f"{EXPERT}_scale_inv")
    edit_tensors(path, lambda tensors: tensors.pop(f"{EXPERT}_scale_inv"))
    refused(source, tmp_path / "out", rf"{path.name}: {EXPERT}_scale_inv: the index puts it here")
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"].pop(f"{EXPERT}_scale_inv")
    index.write_text(json.dumps(data))
    refused(source, tmp_path / "out", rf"{EXPERT}.*weight_scale_inv is missing|{EXPERT}: is FP8")


def test_tensor_in_no_index(source, tmp_path):
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    file = data["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(data))
    refused(source, tmp_path / "out", rf"{file}: model\.norm\.weight: stands in no index")


def test_duplicate_tensor(source, tmp_path):
    other = next(path for path in sorted(source.glob("*.safetensors")) if path != home(source, EXPERT))
    edit_tensors(other, lambda tensors: tensors.update({EXPERT: torch.zeros(4, 4)}))
    refused(source, tmp_path / "out", rf"{other.name}: {EXPERT}: is a second copy")


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", [f"{EXPERT}_scale_inv", "model.layers.1.mlp.gate.weight", "model.norm.weight"]
)
def test_not_finite(source, tmp_path, name, value):
    path = home(source, name)

    def spoil(tensors):
        tensors[name].view(-1)[1 if tensors[name].numel() > 1 else 0] = value

    edit_tensors(path, spoil)
    message = refused(source, tmp_path / "out", name)
    assert path.name in message
    assert str(value) in message


def test_nan_in_fp8_weight_is_located(source, tmp_path):
    path = home(source, EXPERT)

    def spoil(tensors):
        tensors[EXPERT].view(torch.uint8)[7, 9] = 0x7F

    edit_tensors(path, spoil)
    message = refused(source, tmp_path / "out", EXPERT)
    assert path.name in message
    assert "[7, 9] is nan" in message


def test_position_of_a_nan_in_a_matrix_read_in_pieces(source, tmp_path, monkeypatch):
    monkeypatch.setattr("moebox.quantize.pipeline.PIECE_BYTES", 10_000)
    path = home(source, "lm_head.weight")

    def spoil(tensors):
        tensors["lm_head.weight"][300, 9] = float("nan")

    edit_tensors(path, spoil)
    assert "[300, 9]" in refused(source, tmp_path / "out", r"lm_head\.weight")


def test_a_repaired_source_counts_as_another(source, tmp_path):
    path, dst = home(source, EXPERT), tmp_path / "out"
    good = path.read_bytes()
    edit_tensors(path, lambda tensors: tensors[EXPERT].view(torch.uint8).fill_(0x7F))
    refused(source, dst, EXPERT)
    path.write_bytes(good)
    refused(source, dst, "start over with --no-resume")
    quantize(source, dst, shard_bytes=SHARD_BYTES, resume=False)
    quantize(source, tmp_path / "clean", shard_bytes=SHARD_BYTES)
    assert contents(dst) == contents(tmp_path / "clean")


def test_shape_that_contradicts_the_config(source, tmp_path):
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"moe_intermediate_size": 96}))
    message = refused(source, tmp_path / "out", "contradicts config.json")
    assert ".safetensors" in message


def test_layer_that_the_config_does_not_have(source, tmp_path):
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    refused(source, tmp_path / "out", r"model\.layers\.")


def test_config_that_is_no_json(source, tmp_path):
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "out", r"config\.json: cannot be read as JSON", ConfigError)


def test_a_bad_source_leaves_a_complete_output_alone(source, tmp_path):
    dst = tmp_path / "out"
    quantize(source, dst)
    before = contents(dst)
    home(source, EXPERT).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        quantize(source, dst, resume=False)
    assert contents(dst) == before


def test_foreign_destination_is_left_alone(source, tmp_path):
    dst = tmp_path / "mine"
    dst.mkdir()
    (dst / "thesis.txt").write_text("do not touch")
    before = contents(dst)
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"thesis\.txt, which moebox did not write"):
            quantize(source, dst, resume=resume)
        assert contents(dst) == before
    assert [path.name for path in dst.iterdir()] == ["thesis.txt"]


def test_destination_and_source_must_not_overlap(source, tmp_path):
    for dst in (source, source / "int4", tmp_path):
        with pytest.raises(CheckpointError, match="lies in, is or holds the source"):
            quantize(source, dst)
    assert not (source / "int4").exists()


def test_destination_that_cannot_be_written(source, tmp_path):
    with pytest.raises(CheckpointError, match="/proc/moebox: cannot be written"):
        quantize(source, "/proc/moebox")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        quantize(source, tmp_path / "file")


@pytest.mark.slow
def test_file_size_limit_keeps_finished_shards(source, tmp_path):
    """RLIMIT_FSIZE fails a write as a full disk does, in a real process without privileges."""
    dst = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    child = start(source, dst, setup=limit)
    errors = child.wait()
    assert child.returncode == 1
    assert "PlanError" in errors
    assert "disk full or file size limit reached" in errors
    assert "Traceback" not in errors
    assert [path.name for path in dst.glob("*.safetensors")] == ["model-00001-of-00018.safetensors"]
    assert not list((dst / ".moebox").glob("*.partial"))
    result = quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert result.shards_resumed == 1
    quantize(source, tmp_path / "clean", shard_bytes=SHARD_BYTES)
    assert contents(dst) == contents(tmp_path / "clean")


@pytest.mark.slow
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_disk_that_fills_up_in_the_middle(source, tmp_path, monkeypatch, call):
    dst, real, calls = tmp_path / "out", getattr(os, call), []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 8 and len(list(dst.glob("*.safetensors"))) >= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        refused(source, dst, "disk full.*\nFree some space and run the same command again", PlanError)
    kept = len(list(dst.glob("*.safetensors")))
    assert kept >= 3
    result = quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert result.shards_resumed >= 3 - (call == "fsync")
    quantize(source, tmp_path / "clean", shard_bytes=SHARD_BYTES)
    assert contents(dst) == contents(tmp_path / "clean")


def test_source_that_changes_meanwhile(source, tmp_path):
    last = home(source, "model.layers.3.mlp.experts.11.up_proj.weight")
    dst = tmp_path / "out"

    def progress(report):
        if report.shard == 3 and last.stat().st_size:
            last.write_bytes(b"")

    with pytest.raises(CheckpointError, match=rf"{last.name}.*(changed|shrunk)"):
        quantize(source, dst, shard_bytes=SHARD_BYTES, progress=progress)
    assert not (dst / "moebox.json").exists()
