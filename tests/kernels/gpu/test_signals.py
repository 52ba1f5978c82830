"""The mailbox and the flags between the GPU's program and the host."""

from __future__ import annotations

import inspect
import threading

import pytest
import torch

from moebox.kernels.gpu.base import Ops
from moebox.kernels.gpu.ops import load_ops
from moebox.kernels.gpu.reference import ops as torch_ops
from moebox.kernels.gpu.triton import ops as triton_ops
from moebox.kernels.gpu.triton import signals


def test_post(device):
    hidden = torch.randn(300).bfloat16()
    posted = [torch.arange(6, dtype=torch.int32), torch.rand(6), hidden]
    mailbox = [torch.zeros(6, dtype=torch.int32), torch.zeros(6), torch.zeros(300).bfloat16()]
    flag = torch.zeros(16, dtype=torch.int32)
    if device.type == "cuda":
        mailbox, flag = [array.pin_memory() for array in mailbox], flag.pin_memory()
    signals.post(*(array.to(device) for array in posted), *mailbox, flag)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(mailbox, posted, strict=True))
    assert flag.tolist() == [1] + [0] * 15


def test_wait_returns_at_a_raised_flag(device):
    signals.wait(torch.ones(16, dtype=torch.int32, device=device))


@pytest.mark.parametrize("ops", ["stand-in", "triton"])
def test_wait_holds_until_the_flag_is_raised(ops, device):
    """Also in the interpreter, which polls the host's memory as a GPU does."""
    if ops == "stand-in":
        device = torch.device("cpu")
    flag = torch.zeros(16, dtype=torch.int32)
    if device.type == "cuda":
        flag = flag.pin_memory()
    seen = []

    def wait() -> None:
        (torch_ops if ops == "stand-in" else signals).wait(flag)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seen.append(int(flag[0]))

    waiter = threading.Thread(target=wait)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive() and not seen
    flag[0] = 1
    waiter.join(30)
    assert seen == [1]


def test_both_kinds_of_operations_have_the_same_interface():
    names = [name for name in vars(Ops) if not name.startswith("_")]
    assert sorted(names) == sorted(torch_ops.__all__) == sorted(triton_ops.__all__)
    for name in names:
        asked = list(inspect.signature(getattr(Ops, name)).parameters)[1:]
        for module in (torch_ops, triton_ops):
            assert list(inspect.signature(getattr(module, name)).parameters) == asked


def test_load_ops():
    assert load_ops(torch.device("cpu")) is torch_ops
    assert load_ops(torch.device("cuda", 1)) is triton_ops
