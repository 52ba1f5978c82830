"""Strict reading of safetensors files that the library wrote, and headers that the library reads."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import (
    TensorSpec,
    encode_header,
    map_bytes,
    open_tensor,
    read_header,
    read_index,
)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int32),
        "c": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "odd": torch.arange(3, dtype=torch.uint8),
        "last": torch.randn(2, 2),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, path)
    return path, tensors


def rewrite(path, change):
    """Apply `change` to the header and write the file again, data untouched."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_reads_what_the_library_wrote(shard):
    path, tensors = shard
    infos = read_header(path)
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(open_tensor(infos[name]).view(torch.uint8), tensor.view(torch.uint8)), name
        assert map_bytes(infos[name]).nbytes == tensor.numel() * tensor.element_size()


def test_writing_to_a_view_leaves_the_file_alone(shard):
    path, _ = shard
    before = path.read_bytes()
    open_tensor(read_header(path)["a"]).fill_(0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncation_is_named(shard, keep):
    path, _ = shard
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_header(path)


def test_trailing_bytes_are_refused(shard):
    path, _ = shard
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="1 bytes behind"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["a"].update(shape=[3, 6]), "a: BF16 .3, 6. takes 36 bytes"),
        (lambda h: h["a"].update(dtype="Q7"), "'Q7'"),
        (lambda h: h["a"].update(shape=[-3, -5]), "malformed"),
        (lambda h: h["a"].update(data_offsets=[0]), "malformed"),
        (lambda h: h.pop("b"), "hole"),
        (lambda h: h.update(twin=h["b"]), "overlaps"),
        (lambda h: h["b"].update(data_offsets=[900, 928]), "hole|ends at"),
    ],
)
def test_a_wrong_header_is_named(shard, change, message):
    path, _ = shard
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


def test_a_name_given_twice_is_refused(shard):
    path, _ = shard
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].replace(b'"odd"', b'"a"')
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="'a' twice"):
        read_header(path)


def test_a_file_that_shrank_after_opening_is_refused(shard):
    path, _ = shard
    info = max(read_header(path).values(), key=lambda info: info.offset)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{info.name}: the file has shrunk"):
        open_tensor(info)


def test_the_index_may_not_leave_its_folder(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(CheckpointError, match="not a file name"):
        read_index(tmp_path)


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        read_index(tmp_path)


@pytest.mark.parametrize("alignment", [8, 4096])
def test_the_library_reads_what_a_written_header_describes(tmp_path, alignment):
    specs = [TensorSpec("a", "F32", (3, 2)), TensorSpec("b", "BF16", (5,)), TensorSpec("c", "I32", (0,))]
    tensors = {
        "a": torch.arange(6.0).view(3, 2),
        "b": torch.ones(5).bfloat16(),
        "c": torch.empty(0, dtype=torch.int32),
    }
    header = encode_header(specs, alignment)
    data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + data)
    assert len(header) % alignment == 0
    assert sum(spec.nbytes for spec in specs) == len(data)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
    assert {name: info.offset - len(header) for name, info in read_header(path).items()} == {
        "a": 0,
        "b": 24,
        "c": 34,
    }
