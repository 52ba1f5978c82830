"""The stated model of a box whose energy counters cannot be read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from moebox.errors import MoeboxError


@dataclass(frozen=True)
class PowerModel:
    """Watts of a box without its GPU; what a wall meter says is better than these guesses.

    Attributes:
        idle_watts: processor, board, drives and fans of one socket at rest.
        watts_per_core: more for each core that works; a 64-core server part at 350 W gives about 5.
        dram_watts: of the memory, at work or not; each module takes 2 to 5.

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


GUESSED = PowerModel()
"""For boxes of which nothing is known."""
