"""Energy and price of an answer, and the tiers of its experts, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moebox.cost.economics import TokenCost
from moebox.cost.figures import money, rate, share
from moebox.cost.usage import Joules, Traffic, Usage, total_joules


def cost_line(usage: Usage, cost: TokenCost | None, currency: str) -> str | None:
    """Energy and price of a token, and hits by tier, on one line; None where nothing was computed."""
    hits = hits_text(usage.traffic)
    parts = [
        energy_text(usage.energy, usage.computed_tokens),
        None if cost is None else price_text(cost, currency),
        None if hits is None else f"experts {hits}",
    ]
    return " · ".join(part for part in parts if part) or None


def energy_text(energy: Sequence[Joules], tokens: float) -> str | None:
    """`12.4 J/token (GPU 10.1, CPU 2.0 est., DRAM 0.30 est.)`; None: no tokens, or nothing was measured.

    "est." marks what the stated model of idle and per-core watts gave; all else was measured.
    """
    if not tokens or not energy:
        return None
    sources = [
        f"{part.source.upper()} {_joules(part.joules / tokens)}"
        + (" est." if part.method == "estimated" else "")
        for part in energy
    ]
    return f"{_joules(total_joules(energy) / tokens)} J/token ({', '.join(sources)})"


def _joules(value: float) -> str:
    return rate(value) if value >= 0.1 else f"{value:.2g}"


def price_text(cost: TokenCost, currency: str) -> str:
    """`$14.10/1M tokens at full use`, or `$0.09/1M tokens, electricity only` without other prices."""
    text = f"{money(cost.total, currency)}/1M tokens"
    if not cost.hardware and not cost.other:
        return f"{text}, electricity only"
    return f"{text} at {'full' if cost.utilisation == 1 else share(cost.utilisation)} use"


def hits_text(traffic: Traffic) -> str | None:
    """Tiers in which experts were found: `56 % GPU, 40 % RAM, 4 % disk`; None where none were used."""
    if not traffic.hits:
        return None
    tiers = (("GPU", traffic.gpu_hits), ("RAM", traffic.ram_hits), ("disk", traffic.disk_hits))
    return ", ".join(f"{share(n / traffic.hits)} {name}" for name, n in tiers if n)


def energy_dict(energy: Sequence[Joules], tokens: float) -> dict[str, Any]:
    """For `--json`: joules of all sources, per token, and by source."""
    joules = total_joules(energy)
    return {
        "joules": joules,
        "joules_per_token": joules / tokens if tokens else None,
        "estimated": any(part.method == "estimated" for part in energy),
        "sources": [asdict(part) for part in energy],
    }


def cost_dict(cost: TokenCost | None, currency: str) -> dict[str, Any] | None:
    """For `--json`: money per million tokens by part, as the box was used and at full utilisation."""
    return None if cost is None else {"currency": currency, "per": "million tokens", **cost.to_dict()}
