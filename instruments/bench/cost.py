"""Energy and price of a measured run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moebox.cost.economics import TokenCost, Work, cost_of
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules, total_joules
from moebox.runtime.terminal.cost_text import cost_dict, energy_dict, energy_text, price_text


@dataclass(frozen=True)
class RunCost:
    """Energy and time of the box for some tokens.

    Attributes:
        tokens: computed tokens.
        seconds: time in which the box computed them and nothing else.
        energy: at most one entry per source.
        prices: of electricity and the box.
    """

    tokens: int
    seconds: float
    energy: tuple[Joules, ...]
    prices: Prices

    @property
    def joules_per_token(self) -> float:
        """Joules a token, all sources together."""
        return total_joules(self.energy) / self.tokens

    @property
    def cost(self) -> TokenCost | None:
        """Money per million tokens, at full utilisation unless `prices` names another."""
        return cost_of(Work(self.tokens, total_joules(self.energy), self.seconds), self.prices)

    def times(self, factor: float) -> RunCost:
        """The same tokens in `factor` times the seconds, at the same watts."""
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
            None if cost is None else price_text(cost, self.prices.currency),
        )
        return " · ".join(part for part in parts if part)


def run_cost_dict(cost: RunCost | None) -> dict[str, Any]:
    """Energy and cost for `--json`; None for both if energy was not measured."""
    return {"energy": None, "cost": None} if cost is None else cost.to_dict()
