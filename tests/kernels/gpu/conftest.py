"""Without a GPU, Triton kernels run in Triton's interpreter, which is chosen before triton is imported."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    import helpers.triton.interpreter  # noqa: F401 - patches it


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU with the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Reproducible numbers."""
    return torch.Generator().manual_seed(7)
