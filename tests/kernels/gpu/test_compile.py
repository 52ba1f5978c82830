"""Triton's compiler must accept what its interpreter runs; overlapping kernels must not read too early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

READS_WEIGHTS_AHEAD = {"_combine_norm", "_gemv", "_absorb", "_value_up", "down"}
POLLS = {"_wait"}


@pytest.mark.slow
def test_kernels_compile_for_hopper_and_wait_for_their_predecessors():
    """Before `griddepcontrol.wait` a kernel may read weights (or poll a flag), and never write."""
    program = Path(__file__).parent / "compile_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(program.parents[2])
    result = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    accesses = json.loads(result.stdout)
    assert len(accesses) == 16
    for name, order in accesses.items():
        before = order[: order.index("griddepcontrol.wait")]
        if name == "_absorb":  # two branches, each with its own wait; the first one reads nothing ahead
            assert not before and order.count("griddepcontrol.wait") == 2
        elif name in READS_WEIGHTS_AHEAD | POLLS:
            assert before and all(access.startswith("ld.") for access in before), name
        else:
            assert not before, name
