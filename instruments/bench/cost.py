"""What a measured run used of the box, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moebox.cost.economics import TokenCost, Work, cost_of
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules
from moebox.runtime.terminal.cost_text import cost_dict, energy_dict, energy_text, money_text


@dataclass(frozen=True)
class Spent:
    """Joules and time of the box for some tokens.

    Attributes:
        tokens: that were computed.
        seconds: in which the box did nothing else.
        energy: at most one entry per source.
        prices: of electricity and the box.
    """

    tokens: int
    seconds: float
    energy: tuple[Joules, ...]
    prices: Prices

    @property
    def joules_per_token(self) -> float:
        """Of all sources."""
        return sum(part.joules for part in self.energy) / self.tokens

    @property
    def cost(self) -> TokenCost | None:
        """Money per million tokens, at full utilisation unless `prices` names another."""
        joules = sum(part.joules for part in self.energy)
        return cost_of(Work(self.tokens, joules, self.seconds), self.prices)

    def times(self, factor: float) -> Spent:
        """The same tokens in so many times the time, at the same watts."""
        energy = tuple(replace(part, joules=part.joules * factor) for part in self.energy)
        return replace(self, seconds=self.seconds * factor, energy=energy)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "energy": energy_dict(self.energy, self.tokens),
            "cost": cost_dict(self.cost, self.prices.currency),
        }

    def __str__(self) -> str:
        cost = self.cost
        parts = (
            energy_text(self.energy, self.tokens),
            None if cost is None else money_text(cost, self.prices.currency),
        )
        return " · ".join(part for part in parts if part)
