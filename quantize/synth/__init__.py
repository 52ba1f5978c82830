"""Random checkpoints of true shapes, to try a box before the real download: `moebox synth`."""

from __future__ import annotations

from typing import Literal, get_args

Shape = Literal["kimi-k2", "tiny"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

Format = Literal["fp8", "bf16", "int4"]
FORMATS: tuple[Format, ...] = get_args(Format)
"""How the weights are stored: as in Kimi-K2-Instruct, unquantized, or as in Kimi-K2-Thinking."""
