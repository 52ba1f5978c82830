"""Requests and idle spells as rows of the ledger's tables, and back. Columns follow the fields of `Usage`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from moebox.cost.usage import (
    SECONDS,
    SOURCES,
    TOKENS,
    TRAFFIC_FIELDS,
    IdleSpell,
    Joules,
    RequestRecord,
    Traffic,
    Usage,
)
from moebox.errors import LedgerError

Row = tuple[str | int | float | None, ...]

ENERGY_COLUMNS = tuple(f"{source}_{part}" for source in SOURCES for part in ("joules", "method"))
SUMMED_COLUMNS = (*TOKENS, *SECONDS, *TRAFFIC_FIELDS)
"""The columns of `Usage` whose values over several requests add up."""
USAGE_COLUMNS = (*SUMMED_COLUMNS, *ENERGY_COLUMNS)
REQUEST_COLUMNS = ("id", "begun_s", "model", "user", "finish_reason", *USAGE_COLUMNS)
IDLE_COLUMNS = ("id", "begun_s", "seconds", *ENERGY_COLUMNS)

_INT64 = 2**63


def request_row(record: RequestRecord) -> Row:
    """A request's values, in the order of `REQUEST_COLUMNS`.

    Raises:
        LedgerError: a value has the wrong type, is not finite, or does not fit into 63 bits.
    """
    try:
        return (
            text_value(record.id),
            _real(record.begun_s),
            text_value(record.model),
            text_value(record.user),
            text_value(record.finish_reason),
            *_usage_values(record.usage),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"request {record.id!r} cannot be recorded: {error}") from error


def idle_row(spell: IdleSpell) -> Row:
    """A spell's values under a new id, in the order of `IDLE_COLUMNS`. Raises as `request_row` does."""
    try:
        energy = _energy_values(spell.energy)
        return (uuid4().hex, _real(spell.begun_s), _real(spell.seconds), *energy)
    except (TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"an idle spell cannot be recorded: {error}") from error


def record_of(row: Sequence[Any]) -> RequestRecord:
    """The request of a row of `REQUEST_COLUMNS`."""
    id, begun_s, model, user, finish_reason, *values = row
    return RequestRecord(id, begun_s, model, user, finish_reason, usage_of(values))


def spell_of(row: Sequence[Any]) -> IdleSpell:
    """The spell of a row of `IDLE_COLUMNS`."""
    return IdleSpell(row[1], row[2], _energy_of(row[3:]))


def usage_of(values: Sequence[Any]) -> Usage:
    """The usage of values in the order of `USAGE_COLUMNS`."""
    amounts = dict(zip(USAGE_COLUMNS, values, strict=True))
    traffic = Traffic(**{name: amounts[name] for name in TRAFFIC_FIELDS})
    energy = _energy_of([amounts[name] for name in ENERGY_COLUMNS])
    return Usage(**{name: amounts[name] for name in (*TOKENS, *SECONDS)}, traffic=traffic, energy=energy)


def _usage_values(usage: Usage) -> Row:
    return (
        *_values(usage, TOKENS, _whole),
        *_values(usage, SECONDS, _real),
        *_values(usage.traffic, TRAFFIC_FIELDS, _whole),
        *_energy_values(usage.energy),
    )


def _values(holder: object, names: Sequence[str], convert: Callable[[Any], int | float]) -> Row:
    return tuple(convert(getattr(holder, name)) for name in names)


def _energy_of(values: Sequence[Any]) -> tuple[Joules, ...]:
    pairs = zip(SOURCES, values[::2], values[1::2], strict=True)
    return tuple(Joules(source, joules, method) for source, joules, method in pairs if method is not None)


def _energy_values(energy: Sequence[Joules]) -> Row:
    parts = {part.source: part for part in energy}
    if len(parts) < len(energy) or not parts.keys() <= set(SOURCES):
        raise ValueError(f"its energy has sources {[part.source for part in energy]}")
    found = (parts.get(source) for source in SOURCES)
    pairs = ((_real(part.joules), text_value(part.method)) if part else (None, None) for part in found)
    return tuple(value for pair in pairs for value in pair)


def _whole(value: int) -> int:
    # sqlite3 would store a NumPy integer as bytes.
    number = operator.index(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{number} does not fit into 63 bits")
    return number


def _real(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def text_value(value: str) -> str:
    """A text as the ledger stores it: bytes of a name that are not UTF-8 become `\\udc..` escapes."""
    return value.encode("utf-8", "backslashreplace").decode()
