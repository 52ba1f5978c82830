"""The mailbox's table drives what is allocated, and what the host's side accepts."""

from __future__ import annotations

import pytest
import torch

from helpers.offload.decode_rig import Rig, Spec
from moebox._kernels import FLAG_WORDS, SPLIT_WORDS, mailbox_shapes
from moebox.offload.decode.mailbox import MAILBOX_FIELDS, Mailbox
from moebox.offload.device.stand_in import StandInDevice

LAYERS, TOP_K, HIDDEN = 5, 3, 64
SIZES = {
    "L": LAYERS,
    "k": TOP_K,
    "1+k": 1 + TOP_K,
    "H": HIDDEN,
    "n": TOP_K,
    "F": FLAG_WORDS,
    "S": SPLIT_WORDS,
    "1": 1,
}


class RecordingDevice(StandInDevice):
    """Knows which tensors are pinned, and which device memory."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, str] = {}

    def pinned(self, shape, dtype):
        tensor = super().pinned(shape, dtype)
        self.made[tensor.data_ptr()] = "pinned"
        return tensor

    def empty(self, shape, dtype):
        tensor = super().empty(shape, dtype)
        self.made[tensor.data_ptr()] = "device"
        return tensor


def test_the_table_says_what_is_allocated() -> None:
    """Each tensor has the table's dtype, shape and memory, and there is no other."""
    device = RecordingDevice()
    box = Mailbox.allocate(device, LAYERS, TOP_K, HIDDEN)
    assert list(box.tensors) == [field.name for field in MAILBOX_FIELDS]
    for field in MAILBOX_FIELDS:
        tensor = box.tensors[field.name]
        assert tensor.dtype == field.torch_dtype
        assert tensor.shape == tuple(SIZES[symbol] for symbol in field.symbols)
        assert tensor.shape == mailbox_shapes(LAYERS, TOP_K, HIDDEN, TOP_K)[field.name]
        assert device.made[tensor.data_ptr()] == field.memory
        assert getattr(box, field.name) is tensor
        filled = {"one": 1, "split_expert": -LAYERS}.get(field.name, 0)
        assert int(tensor.reshape(len(tensor), -1)[:, 0].sum()) == (
            FLAG_WORDS if field.name == "one" else filled
        )


def test_the_table_describes_each_tensor() -> None:
    """Writer, memory and meaning of each tensor are there for Python, too."""
    fields = {field.name: field for field in MAILBOX_FIELDS}
    assert {field.writer for field in MAILBOX_FIELDS} == {"gpu", "host", "copies"}
    assert [name for name, field in fields.items() if field.memory == "device"] == ["uploaded"]
    assert all(field.meaning for field in MAILBOX_FIELDS)
    assert fields["predicted_ids"].symbols == ("L", "n")


@pytest.mark.parametrize("name", [field.name for field in MAILBOX_FIELDS])
def test_each_tensor_is_checked(name: str) -> None:
    """Wrong dtypes, shapes and strides, read-only memory, a missing tensor: the error names the tensor."""
    rig = Rig(Spec())
    right = rig.box.tensors[name]
    wrong = {
        rf"^{name}: dtype float64 given, \w+ needed": (TypeError, right.double()),
        rf"^{name}: shape \[.*\] given, \[.*\] needed": (ValueError, torch.zeros(9, 2, 2, dtype=right.dtype)),
        rf"^{name}: not contiguous": (ValueError, torch.stack([right, right], dim=-1)[..., 0]),
        rf"^{name}: \w+ given, an array needed": (TypeError, "a string"),
    }
    if right.dtype != torch.bfloat16:
        read_only = right.numpy().copy()
        read_only.setflags(write=False)
        wrong[rf"^{name}: read-only array given, a writable one needed"] = (ValueError, read_only)
    for match, (error, tensor) in wrong.items():
        rig.box.tensors[name] = tensor
        with pytest.raises(error, match=match):
            rig.make_host()
    del rig.box.tensors[name]
    with pytest.raises(ValueError, match=f"^{name}: missing from the mailbox"):
        rig.make_host()
    rig.box.tensors[name] = right
    rig.make_host()


def test_an_unknown_tensor_is_refused() -> None:
    """A tensor that the table does not list is an error: perhaps a name is misspelt."""
    rig = Rig(Spec())
    rig.box.tensors["sums"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^sums: given, but the mailbox has no tensor of this name"):
        rig.make_host()


def test_sizes_agree_between_tensors() -> None:
    """The first tensor sets the number of layers; k and H are the model's; any n is right."""
    rig = Rig(Spec())
    rig.box.tensors["weights"] = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"^weights: shape \[2, 4\] given, \[L=3, k=4\] needed"):
        rig.make_host()
    rig = Rig(Spec())
    rig.box.tensors["predicted_ids"] = torch.zeros(3, 7, dtype=torch.int32)
    rig.make_host()


def test_memory_that_the_host_writes_must_be_writable() -> None:
    """RAM and the table of its rows, too."""
    rig = Rig(Spec())
    rig.ram_rows = rig.ram_rows.numpy().copy()
    rig.ram_rows.setflags(write=False)
    with pytest.raises(ValueError, match=r"^ram_rows: read-only array given"):
        rig.make_host()
