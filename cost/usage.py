"""What one request used: the row of the ledger, and what passes between runtime and `cost`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moebox.offload.traffic import TRAFFIC_FIELDS, Traffic

__all__ = [
    "CERTAINTY",
    "SOURCES",
    "TRAFFIC_FIELDS",
    "IdleSpell",
    "Joules",
    "Method",
    "Source",
    "Traffic",
    "Usage",
    "add_energy",
]

Source = Literal["gpu", "cpu", "dram"]
SOURCES: tuple[Source, ...] = ("gpu", "cpu", "dram")

Method = Literal["counter", "power", "estimated"]
"""How joules were obtained: from an energy counter (NVML, RAPL), as NVML's power times time, or from the
stated model of idle and per-core watts."""
CERTAINTY: tuple[Method, ...] = ("counter", "power", "estimated")
"""The most certain first."""


@dataclass(frozen=True)
class Joules:
    """Energy of one source, and how it was obtained; a mixture counts as its least certain part."""

    source: Source
    joules: float
    method: Method


def add_energy(some: Sequence[Joules], others: Sequence[Joules]) -> tuple[Joules, ...]:
    """Sums by source; a sum's method is that of its least certain part."""
    sums = {part.source: part for part in some}
    for part in others:
        old = sums.get(part.source, Joules(part.source, 0.0, CERTAINTY[0]))
        method = max(old.method, part.method, key=CERTAINTY.index)
        sums[part.source] = Joules(part.source, old.joules + part.joules, method)
    return tuple(sums[source] for source in SOURCES if source in sums)


@dataclass(frozen=True)
class Usage:
    """One request. Neither its prompt nor its answer is part of it.

    Attributes:
        id: unique, so that no row is written twice.
        begun_s: Unix time.
        model: the checkpoint folder's name.
        user: who asked: the login name, or the name of an API key.
        prompt_tokens: of the whole prompt; `cached_tokens` of them were held from an earlier request.
        completion_tokens: generated.
        queue_s, prefill_s, decode_s: waited, spent on the prompt, spent on the answer.
        finish_reason: as in `Stats`.
        energy: at most one entry per source.
    """

    id: str
    begun_s: float
    model: str
    user: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    finish_reason: str
    energy: tuple[Joules, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def joules(self) -> float:
        """Of all sources."""
        return sum(part.joules for part in self.energy)

    @property
    def computed_tokens(self) -> int:
        """Tokens that were computed: of the prompt what was not cached, and the answer."""
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens


@dataclass(frozen=True)
class IdleSpell:
    """A time in which a model was loaded and no request was open, and what the box drew in it.

    Attributes:
        begun_s: Unix time.
        seconds: how long it was.
        energy: at most one entry per source.
    """

    begun_s: float
    seconds: float
    energy: tuple[Joules, ...]

    @property
    def joules(self) -> float:
        """Of all sources."""
        return sum(part.joules for part in self.energy)
