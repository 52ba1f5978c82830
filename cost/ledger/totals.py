"""Sums over requests, made by SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moebox.cost.ledger.rows import SUMMED_COLUMNS, usage_of
from moebox.cost.usage import METHODS, SOURCES, Usage

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
        key: the model, the user or the day (local time, `2026-11-22`) that the requests share; None: no key.
        requests: their number.
        usage: what they used together. A source's method is that of the least certain request; a request
            that did not measure a source counts as 0 joules of it.
        busy_s: seconds in which the box worked on at least one of them: the time of overlapping requests
            counts once, and waiting does not count.
        first_s, last_s: Unix time when the first of them began and the last of them ended; None: no requests.
    """

    key: str | None = None
    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    busy_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None


CHOSEN = """
    begun_s >= :since_s AND begun_s < :until_s
    AND (:model IS NULL OR model = :model) AND (:user IS NULL OR user = :user)
"""


def totals_by(connection: sqlite3.Connection, key: Key | None, chosen: Mapping[str, Any]) -> list[Totals]:
    """Sums per `key`, in its order, over the requests that `chosen` (the parameters of `CHOSEN`) selects."""
    # GROUP BY NULL would make SQLite sort whole rows although there is only one group.
    group = "" if key is None else "GROUP BY 1"
    rows = connection.execute(_statement(_KEYS[key], group), chosen).fetchall()
    return [_totals(*row) for row in rows]


def _statement(key: str, group: str) -> str:
    """SQL whose rows are busy_s, last_s, key, requests, first_s and the sums in the order of `USAGE_COLUMNS`.

    With the requests ordered by the time when work on them began, each adds to the busy time what lies after
    the latest end of all requests before it.
    """
    sums = [f"SUM({name})" for name in SUMMED_COLUMNS]
    energy = [sql for source in SOURCES for sql in (f"TOTAL({source}_joules)", _least_certain(source))]
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
            SELECT {key} AS key, COUNT(*), MIN(begun_s) AS first_s, {", ".join([*sums, *energy])}
            FROM requests WHERE {CHOSEN} {group}
        )
        SELECT busy_s, last_s, summed.* FROM summed JOIN busy ON summed.key IS busy.key ORDER BY summed.key
    """


def _least_certain(source: str) -> str:
    """SQL for the last of `METHODS` among the values of a source's method."""
    ranks = " ".join(f"WHEN '{method}' THEN {rank}" for rank, method in enumerate(METHODS))
    names = " ".join(f"WHEN {rank} THEN '{method}'" for rank, method in enumerate(METHODS))
    return f"CASE MAX(CASE {source}_method {ranks} END) {names} END"


def _totals(
    busy_s: float, last_s: float, key: str | None, requests: int, first_s: float, *sums: Any
) -> Totals:
    if not requests:
        return Totals()
    return Totals(key, requests, usage_of(sums), busy_s, first_s, last_s)
