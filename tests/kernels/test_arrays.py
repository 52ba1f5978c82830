"""Arrays at the border between Python and C++: what is written must be writable, what is read need not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.experts import random_arrays
from moebox import _kernels
from moebox.kernels import cpu

ROWS, COLUMNS = 4, 64


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def experts_forward(out: object) -> None:
    """One expert for two tokens, with read-only arrays wherever the kernel only reads."""
    bits = [t if t.dtype == torch.int32 else t.view(torch.uint16) for t in random_arrays(COLUMNS, 32)]
    cpu.experts_forward(
        cpu.ThreadPool(1),
        [cpu.Expert(*(read_only(t.numpy()) for t in bits))],
        read_only(np.array([0, 2], np.int32)),
        read_only(np.array([0, 1], np.int32)),
        read_only(np.ones(2, np.float32)),
        read_only(np.ones((2, COLUMNS), np.float32)),
        out,
    )


def quantize_int4(packed: object, scale: object) -> None:
    weight = read_only(np.ones((ROWS, COLUMNS), np.float32).view(np.uint8))
    _kernels.quantize_int4(weight, "F32", None, packed, scale, 1, None)


def to_bfloat16(out: object) -> None:
    weight = read_only(np.ones((ROWS, COLUMNS), np.float32).view(np.uint8))
    _kernels.to_bfloat16(weight, "F32", None, out, 1, None)


def test_experts_forward_reads_read_only_arrays_and_writes_a_writable_one():
    out = np.zeros((2, COLUMNS), np.float32)
    experts_forward(out)
    assert np.isfinite(out).all() and out.any()


def test_quantize_reads_read_only_arrays_and_writes_writable_ones():
    packed, scale = np.zeros((ROWS, COLUMNS // 8), np.int32), np.zeros((ROWS, COLUMNS // 32), np.uint16)
    quantize_int4(packed, scale)
    assert packed.any() and scale.any()
    out = np.zeros((ROWS, COLUMNS), np.uint16)
    to_bfloat16(out)
    assert (out == 0x3F80).all()  # 1 as bf16


PACKED = np.zeros((ROWS, COLUMNS // 8), np.int32)
SCALE = np.zeros((ROWS, COLUMNS // 32), np.uint16)
WRITES = {
    "out of experts_forward": (experts_forward, [np.zeros((2, COLUMNS), np.float32)], 0),
    "packed of quantize_int4": (quantize_int4, [PACKED, SCALE], 0),
    "scale of quantize_int4": (quantize_int4, [PACKED, SCALE], 1),
    "out of to_bfloat16": (to_bfloat16, [np.zeros((ROWS, COLUMNS), np.uint16)], 0),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_read_only_array_is_refused_where_the_kernel_writes(case):
    call, arrays, which = WRITES[case]
    given = [read_only(array) if i == which else array for i, array in enumerate(arrays)]
    name = case.split()[0]
    with pytest.raises(ValueError, match=f"^{name}: read-only array given, a writable one needed$"):
        call(*given)
    assert not given[which].any()


@pytest.mark.parametrize("case", WRITES)
def test_what_is_no_array_is_refused_by_its_type(case):
    call, arrays, which = WRITES[case]
    given = [[1, 2] if i == which else array for i, array in enumerate(arrays)]
    with pytest.raises(TypeError, match=f"^{case.split()[0]}: list given, an array needed$"):
        call(*given)


def test_export_array():
    """A tensor becomes a capsule on the same memory; a numpy array stays as it is."""
    array = np.zeros(3, np.float32)
    assert cpu.export_array(array) is array
    tensor = torch.zeros(3)
    torch.from_dlpack(cpu.export_array(tensor)).fill_(1.0)
    assert tensor.tolist() == [1.0] * 3
