"""What a request used. Its figures are declared here once; all else holds a `Usage` or reads its fields.

A new figure is one line: a field of `Usage`, a field of `Traffic`, or a name in `Source`. The rows and sums
of the ledger, the sums of a chat, JSON and CSV follow from it. The ledger also needs a migration that adds
the column (`ledger/schema.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from moebox.offload.traffic import TRAFFIC_FIELDS, Traffic

__all__ = [
    "METHODS",
    "SECONDS",
    "SOURCES",
    "TOKENS",
    "TRAFFIC_FIELDS",
    "IdleSpell",
    "Joules",
    "Method",
    "RequestRecord",
    "Source",
    "Traffic",
    "Usage",
    "add_energy",
    "total_joules",
]

Source = Literal["gpu", "cpu", "dram"]
"""A part of the box whose energy is measured."""
SOURCES: tuple[Source, ...] = get_args(Source)

Method = Literal["counter", "power", "estimated"]
"""How joules were obtained, the most certain first: from an energy counter (NVML, RAPL), as NVML's power
times time, or from the stated model of idle and per-core watts (`energy/power_model.py`)."""
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Joules:
    """Energy of one source, and how it was obtained. A sum has the method of its least certain part."""

    source: Source
    joules: float
    method: Method


def total_joules(energy: Iterable[Joules]) -> float:
    """The joules of all sources together."""
    return sum(part.joules for part in energy)


def add_energy(some: Sequence[Joules], others: Sequence[Joules]) -> tuple[Joules, ...]:
    """The sum of each source, in the order of `SOURCES`; its method is that of the least certain part."""
    sums = {part.source: part for part in some}
    for part in others:
        old = sums.get(part.source, Joules(part.source, 0.0, METHODS[0]))
        method = max(old.method, part.method, key=METHODS.index)
        sums[part.source] = Joules(part.source, old.joules + part.joules, method)
    return tuple(sums[source] for source in SOURCES if source in sums)


Unit = Literal["tokens", "s"]


def _tokens() -> Any:
    return field(default=0, metadata={"unit": "tokens"})


def _seconds() -> Any:
    return field(default=0.0, metadata={"unit": "s"})


@dataclass(frozen=True)
class Usage:
    """What one request used, or several requests together (`+`).

    Attributes:
        prompt_tokens: tokens of the prompt that were read: all of them, unless the request ended before.
        cached_tokens: how many of `prompt_tokens` the key-value cache still held from an earlier request.
        completion_tokens: tokens of the answer, without the one that ended it.
        queue_s, prefill_s, decode_s: seconds spent waiting, on the prompt, and on the answer.
        traffic: where the experts were found, and the bytes that moved for them.
        energy: at most one entry per source.
    """

    prompt_tokens: int = _tokens()
    cached_tokens: int = _tokens()
    completion_tokens: int = _tokens()
    queue_s: float = _seconds()
    prefill_s: float = _seconds()
    decode_s: float = _seconds()
    traffic: Traffic = field(default_factory=Traffic)
    energy: tuple[Joules, ...] = field(default=(), metadata={"add": add_energy})

    @property
    def joules(self) -> float:
        """The joules of all sources together."""
        return total_joules(self.energy)

    @property
    def computed_prompt_tokens(self) -> int:
        """Tokens of the prompt that were read and not cached."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def computed_tokens(self) -> int:
        """Tokens that the box computed: of the prompt those that were not cached, and the answer's."""
        return self.computed_prompt_tokens + self.completion_tokens

    @property
    def work_s(self) -> float:
        """Seconds spent on the prompt and the answer; waiting does not count."""
        return self.prefill_s + self.decode_s

    def of_unit(self, unit: Unit) -> dict[str, float]:
        """The figures counted in `unit`, by name, as JSON shows them."""
        return {name: getattr(self, name) for name in _names(unit)}

    def __add__(self, other: Usage) -> Usage:
        sums = {
            part.name: part.metadata.get("add", operator.add)(
                getattr(self, part.name), getattr(other, part.name)
            )
            for part in fields(self)
        }
        return Usage(**sums)


def _names(unit: Unit) -> tuple[str, ...]:
    return tuple(part.name for part in fields(Usage) if part.metadata.get("unit") == unit)


TOKENS = _names("tokens")
"""Names of the fields of `Usage` that count tokens."""
SECONDS = _names("s")
"""Names of the fields of `Usage` that are seconds."""


@dataclass(frozen=True)
class RequestRecord:
    """A request in the ledger. Neither its prompt nor its answer is part of it.

    Attributes:
        id: unique, so that no request is written twice.
        begun_s: Unix time when the request was made, before it waited.
        model: name of the checkpoint's folder.
        user: the login name, or the name of an API key, that made the request.
        finish_reason: a `FinishReason` of `runtime/text/pieces.py`, or "error".
        usage: what the request used.
    """

    id: str
    begun_s: float
    model: str
    user: str
    finish_reason: str
    usage: Usage


@dataclass(frozen=True)
class IdleSpell:
    """A time in which a model was loaded and no request was open, and the energy of the box in that time.

    Attributes:
        begun_s: Unix time.
        seconds: its length.
        energy: at most one entry per source.
    """

    begun_s: float
    seconds: float
    energy: tuple[Joules, ...]

    @property
    def joules(self) -> float:
        """The joules of all sources together."""
        return total_joules(self.energy)
