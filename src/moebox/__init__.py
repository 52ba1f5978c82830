"""moebox: run trillion-parameter mixture-of-experts models of the Kimi K2 family on one box.

    import moebox

    moebox.quantize("moonshotai/Kimi-K2-Instruct", "/nvme/k2")
    model = moebox.load("/nvme/k2")
    print(model.generate("Once upon a time", max_tokens=64, temperature=0.0).text)
    for piece in model.chat([{"role": "user", "content": "Hello!"}]):
        print(piece.text, end="")

Names are imported on first use, so that `moebox --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moebox.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DeviceError,
    LedgerError,
    MoeboxError,
    PlanError,
    RequestError,
    TokenizerError,
)
from moebox.version import __version__

if TYPE_CHECKING:
    from moebox.quantize.convert import QuantizeResult, quantize
    from moebox.runtime.api import Completion, Model, Piece, load
    from moebox.runtime.engine.options import LoadOptions

__all__ = [
    "BusyError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeviceError",
    "LedgerError",
    "LoadOptions",
    "Model",
    "MoeboxError",
    "Piece",
    "PlanError",
    "QuantizeResult",
    "RequestError",
    "TokenizerError",
    "__version__",
    "load",
    "quantize",
]

_HOMES = {
    "Completion": "moebox.runtime.api",
    "Model": "moebox.runtime.api",
    "Piece": "moebox.runtime.api",
    "load": "moebox.runtime.api",
    "LoadOptions": "moebox.runtime.engine.options",
    "QuantizeResult": "moebox.quantize.convert",
}


def __getattr__(name: str) -> Any:
    if name == "quantize":  # a package that can be called: see moebox/quantize/__init__.py
        return import_module("moebox.quantize")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'moebox' has no attribute {name!r}")
