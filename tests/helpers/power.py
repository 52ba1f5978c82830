"""A box with known power: a clock that tests move, a GPU whose counter steps, and RAPL zones as files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Clock:
    """Seconds that pass only by `wait`."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class SteppingGpu:
    """A GPU that draws `power` watts; its counter shows the energy at the last step, 10 times a second."""

    clock: Clock
    power: float = 100.0
    phase: float = 0.0
    step_s: float = 0.1
    _changes: list[tuple[float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changes.append((0.0, 0.0, self.power))

    def draw(self, watts: float) -> None:
        """Draw `watts` from now on."""
        self._changes.append((self.clock(), self.drawn(self.clock()), watts))
        self.power = watts

    def drawn(self, at: float) -> float:
        """The true joules until `at`."""
        began, joules, watts = next(change for change in reversed(self._changes) if change[0] <= at)
        return joules + watts * (at - began)

    def millijoules(self) -> int:
        steps = math.floor((self.clock() - self.phase) / self.step_s)
        return int(1e3 * self.drawn(max(0.0, steps * self.step_s + self.phase)))

    def watts(self) -> float:
        return self.power


def write_zone(root: Path, zone: str, name: str, energy_uj: int = 0, range_uj: int = 262_143_328_850) -> Path:
    """Write one zone below `root`, such as intel-rapl:0; returns the file of its counter."""
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    set_counter(folder / "energy_uj", energy_uj)
    return folder / "energy_uj"


def set_counter(file: Path, energy_uj: int) -> None:
    """Replace the file atomically, so that no reader sees half a number."""
    new = file.with_suffix(".new")
    new.write_text(f"{energy_uj}\n")
    new.replace(file)
