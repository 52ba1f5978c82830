"""Requests and idle spells as rows of the ledger's tables, and back."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from moebox.cost.usage import SOURCES, TRAFFIC_FIELDS, IdleSpell, Joules, Traffic, Usage
from moebox.errors import LedgerError

Row = tuple[str | int | float | None, ...]

_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_SECONDS = ("queue_s", "prefill_s", "decode_s")
_PLAIN = ("id", "begun_s", "model", "user", *_TOKENS, *_SECONDS, "finish_reason")
_N_PLAIN = len(_PLAIN)

ENERGY_COLUMNS = tuple(f"{source}_{part}" for source in SOURCES for part in ("joules", "method"))
REQUEST_COLUMNS = (*_PLAIN, *TRAFFIC_FIELDS, *ENERGY_COLUMNS)
IDLE_COLUMNS = ("id", "begun_s", "seconds", *ENERGY_COLUMNS)

_INT64 = 2**63


def request_row(usage: Usage) -> Row:
    """A request's values, in the order of `REQUEST_COLUMNS`.

    Raises:
        LedgerError: a value is not what its field holds, not finite, or above 63 bits.
    """
    try:
        return (
            text_value(usage.id),
            _real(usage.begun_s),
            text_value(usage.model),
            text_value(usage.user),
            *(_whole(getattr(usage, name)) for name in _TOKENS),
            *(_real(getattr(usage, name)) for name in _SECONDS),
            text_value(usage.finish_reason),
            *(_whole(getattr(usage.traffic, name)) for name in TRAFFIC_FIELDS),
            *_energy_values(usage.energy),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"request {usage.id!r} cannot be recorded: {error}") from error


def idle_row(spell: IdleSpell) -> Row:
    """A spell's values, in the order of `IDLE_COLUMNS`, under a new id; errors as `request_row`."""
    try:
        energy = _energy_values(spell.energy)
        return (uuid4().hex, _real(spell.begun_s), _real(spell.seconds), *energy)
    except (TypeError, ValueError, AttributeError) as error:
        raise LedgerError(f"an idle spell cannot be recorded: {error}") from error


def usage_of(row: Sequence[Any]) -> Usage:
    """The request of a row of `REQUEST_COLUMNS`."""
    plain: dict[str, Any] = dict(zip(_PLAIN, row[:_N_PLAIN], strict=True))
    energy = energy_of(row[_N_PLAIN + len(TRAFFIC_FIELDS) :])
    return Usage(**plain, energy=energy, traffic=Traffic(*row[_N_PLAIN : -len(ENERGY_COLUMNS)]))


def spell_of(row: Sequence[Any]) -> IdleSpell:
    """The spell of a row of `IDLE_COLUMNS`."""
    return IdleSpell(row[1], row[2], energy_of(row[3:]))


def energy_of(values: Sequence[Any]) -> tuple[Joules, ...]:
    """What was measured, from values in the order of `ENERGY_COLUMNS`."""
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
    # A NumPy integer would be stored as bytes.
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
    """A text as it is stored: a folder's name may hold bytes that are not UTF-8."""
    return value.encode("utf-8", "backslashreplace").decode()
