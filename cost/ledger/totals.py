"""Sums over requests, made by SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moebox.cost.ledger.rows import energy_of
from moebox.cost.usage import SOURCES, TRAFFIC_FIELDS, Joules, Traffic

Key = Literal["model", "user", "day"]

_KEYS: dict[Key | None, str] = {
    None: "NULL",
    "model": "model",
    "user": "user",
    "day": "date(begun_s, 'unixepoch', 'localtime')",
}


@dataclass(frozen=True)
class Totals:
    """Sums over some requests.

    Attributes:
        key: the model, the user or the day (local time, `2026-11-22`) that they share; None: all requests.
        requests: how many.
        busy_s: seconds in which at least one of them was worked on: those of overlapping requests count
            once, and waiting does not count.
        first_s, last_s: Unix time when the first of them began and the last of them ended; None: no requests.
        energy: a source's method is that of its least certain request; requests that did not measure a source
            count as 0 joules of it.
    """

    key: str | None = None
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    busy_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    energy: tuple[Joules, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def joules(self) -> float:
        """Of all sources."""
        return sum(part.joules for part in self.energy)

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed: of the prompts what was not cached, and the answers."""
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens


CHOSEN = """
    begun_s >= :since_s AND begun_s < :until_s
    AND (:model IS NULL OR model = :model) AND (:user IS NULL OR user = :user)
"""


def totals_by(connection: sqlite3.Connection, key: Key | None, chosen: Mapping[str, Any]) -> list[Totals]:
    """Sums per `key`, in its order, over the requests that `chosen` (the parameters of `CHOSEN`) selects."""
    # One group for all would have SQLite sort whole rows for nothing.
    group = "" if key is None else "GROUP BY 1"
    rows = connection.execute(_statement(_KEYS[key], group), chosen).fetchall()
    return [_totals(row) for row in rows]


_SUMMED = ("prompt_tokens", "cached_tokens", "completion_tokens", "queue_s", "prefill_s", "decode_s")
_PLAIN = ("busy_s", "last_s", "key", "requests", *_SUMMED, "first_s")


def _statement(key: str, group: str) -> str:
    """Ordered by their start, each request adds to the busy time what lies after the end of all before it."""
    sums = ", ".join(f"SUM({name})" for name in _SUMMED)
    traffic = ", ".join(f"SUM({name})" for name in TRAFFIC_FIELDS)
    energy = ", ".join(f"TOTAL({source}_joules), {_least_certain(source)}" for source in SOURCES)
    return f"""
        WITH worked AS (
            SELECT {key} AS key, begun_s + queue_s AS from_s, begun_s + queue_s + prefill_s + decode_s AS to_s
            FROM requests WHERE {CHOSEN}
        ), ordered AS (
            SELECT *, MAX(to_s) OVER (
                PARTITION BY key ORDER BY from_s ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS before_s FROM worked
        ), busy AS (
            SELECT key, SUM(MAX(0.0, to_s - MAX(from_s, COALESCE(before_s, from_s)))) AS busy_s,
                MAX(to_s) AS last_s
            FROM ordered {group}
        ), summed AS (
            SELECT {key} AS key, COUNT(*), {sums}, MIN(begun_s) AS first_s, {traffic}, {energy}
            FROM requests WHERE {CHOSEN} {group}
        )
        SELECT busy_s, last_s, summed.* FROM summed JOIN busy ON summed.key IS busy.key ORDER BY summed.key
    """


def _least_certain(source: str) -> str:
    ranks = f"CASE {source}_method WHEN 'counter' THEN 0 WHEN 'power' THEN 1 WHEN 'estimated' THEN 2 END"
    return f"CASE MAX({ranks}) WHEN 0 THEN 'counter' WHEN 1 THEN 'power' WHEN 2 THEN 'estimated' END"


def _totals(row: tuple[Any, ...]) -> Totals:
    if not row[_PLAIN.index("requests")]:
        return Totals()
    moved = len(_PLAIN) + len(TRAFFIC_FIELDS)
    plain: dict[str, Any] = dict(zip(_PLAIN, row[: len(_PLAIN)], strict=True))
    return Totals(**plain, energy=energy_of(row[moved:]), traffic=Traffic(*row[len(_PLAIN) : moved]))
