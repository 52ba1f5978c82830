"""The stated watts of a box whose energy counters cannot be read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moebox.errors import MoeboxError


@dataclass(frozen=True)
class PowerModel:
    """Watts of a box without its GPU. The defaults are estimates; values from a wall meter are better.

    Attributes:
        idle_watts: power of processor, board, drives and fans of one socket at rest.
        watts_per_core: additional power of each core that works: about 350 W / 64 cores = 5.5 W for a server
            processor.
        dram_watts: power of the memory, at work or at rest: 2 to 5 W for each module.

    Raises:
        MoeboxError: a figure is negative or not a number.
    """

    idle_watts: float = 60.0
    watts_per_core: float = 5.0
    dram_watts: float = 20.0

    def __post_init__(self) -> None:
        for field in fields(self):
            watts = getattr(self, field.name)
            if not (math.isfinite(watts) and watts >= 0):
                raise MoeboxError(f"{field.name} is {watts}", "Give watts: a number of 0 or more.")


DEFAULT_POWER = PowerModel()
"""The model where the prices state no watts."""
