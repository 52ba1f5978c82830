"""Tests compute on the CPU unless they name a device, on machines with a GPU too."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports triton: bitsandbytes does, and its kernels would not be interpreted any more.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def cpu_by_default(monkeypatch):
    monkeypatch.setattr("moebox.runtime.engine.engine._default_device", lambda: "cpu")


@pytest.fixture(autouse=True, scope="session")
def own_folders(tmp_path_factory):
    """What tests and their subprocesses keep, such as statistics and ledgers, is not the user's."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.delenv("MOEBOX_LEDGER", raising=False)
        yield
