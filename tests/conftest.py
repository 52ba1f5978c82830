"""Tests compute on the CPU unless they name a device, on machines with a GPU too."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: bitsandbytes does, and its kernels would not be interpreted any more.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def cpu_by_default(monkeypatch):
    monkeypatch.setattr("moebox.runtime.engine._default_device", lambda: "cpu")
