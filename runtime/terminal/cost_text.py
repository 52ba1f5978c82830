"""What an answer cost, as text and as JSON: energy, money, and where its experts were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from moebox.cost.economics import TokenCost
from moebox.cost.figures import money, rate, share
from moebox.cost.usage import Joules, Traffic

_COST_PARTS = ("electricity", "hardware", "other", "total", "utilisation")
SOURCE_NAMES = {"gpu": "GPU", "cpu": "CPU", "dram": "DRAM"}


class Used(Protocol):
    """What one answer used, or several: `Stats`, or the sum of some."""

    @property
    def energy(self) -> tuple[Joules, ...]: ...
    @property
    def computed_tokens(self) -> int: ...
    @property
    def traffic(self) -> Traffic: ...


def cost_line(used: Used, cost: TokenCost | None, currency: str) -> str | None:
    """Joules and money a token, and hits by tier; None where nothing was computed."""
    hits = hits_text(used.traffic)
    parts = [
        energy_text(used.energy, used.computed_tokens),
        None if cost is None else money_text(cost, currency),
        None if hits is None else f"experts {hits}",
    ]
    return " · ".join(part for part in parts if part) or None


def energy_text(energy: Sequence[Joules], tokens: float) -> str | None:
    """`12.4 J/token (GPU 10.1, CPU 2.0 est., DRAM 0.30 est.)`; None: no tokens, or nothing was measured.

    "est." is from the stated model of idle and per-core watts, all else from counters.
    """
    if not tokens or not energy:
        return None
    sources = [
        f"{SOURCE_NAMES[part.source]} {_joules(part.joules / tokens)}"
        + (" est." if part.method == "estimated" else "")
        for part in energy
    ]
    return f"{_joules(sum(part.joules for part in energy) / tokens)} J/token ({', '.join(sources)})"


def _joules(value: float) -> str:
    return rate(value) if value >= 0.1 else f"{value:.2g}"


def money_text(cost: TokenCost, currency: str) -> str:
    """`$14.10/1M tokens at full use`, or `$0.09/1M tokens, electricity only` where no more is known."""
    text = f"{money(cost.total, currency)}/1M tokens"
    if not cost.hardware and not cost.other:
        return f"{text}, electricity only"
    return f"{text} at {'full' if cost.utilisation == 1 else share(cost.utilisation)} use"


def hits_text(traffic: Traffic) -> str | None:
    """Where experts were found: `56 % GPU, 40 % RAM, 4 % disk`; None where none were used."""
    if not traffic.hits:
        return None
    tiers = (("GPU", traffic.gpu_hits), ("RAM", traffic.ram_hits), ("disk", traffic.disk_hits))
    return ", ".join(f"{share(n / traffic.hits)} {name}" for name, n in tiers if n)


def energy_dict(energy: Sequence[Joules], tokens: float) -> dict[str, Any]:
    """For `--json`: joules in all, per token and by source."""
    joules = sum(part.joules for part in energy)
    return {
        "joules": joules,
        "joules_per_token": joules / tokens if tokens else None,
        "estimated": any(part.method == "estimated" for part in energy),
        "sources": [asdict(part) for part in energy],
    }


def cost_dict(cost: TokenCost | None, currency: str) -> dict[str, Any] | None:
    """For `--json`: money per million tokens by part, as it was and on a box that never waits."""
    if cost is None:
        return None
    full = cost.at_full_utilisation
    return {
        "currency": currency,
        "per": "million tokens",
        **{
            name: getattr(cost, name) for name in ("electricity", "hardware", "other", "total", "utilisation")
        },
        "at_full_utilisation": asdict(full) | {"total": full.total},
    }
