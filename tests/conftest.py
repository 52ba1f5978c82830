"""Tests compute on the CPU unless they name a device, on machines with a GPU too."""

import pytest


@pytest.fixture(autouse=True)
def cpu_by_default(monkeypatch):
    monkeypatch.setattr("moebox.runtime.engine._default_device", lambda: "cpu")
