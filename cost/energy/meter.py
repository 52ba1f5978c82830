"""Whose joules they were: what the box draws, shared among the requests that are open at the time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moebox.cost.energy.power_model import GUESSED, PowerModel
from moebox.cost.energy.power_sources import PowerSource, open_sources
from moebox.cost.usage import IdleSpell, Joules, Source
from moebox.errors import DeviceError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("moebox")


class Span:
    """The time in which one request uses the box; made by `EnergyMeter.begin`."""

    def __init__(self, meter: EnergyMeter, began_s: float, sources: Sequence[Source]) -> None:
        self._meter, self._began_s = meter, began_s
        self._joules: dict[Source, float] = dict.fromkeys(sources, 0.0)
        self._tokens = self._shared_tokens = 0
        self._energy: tuple[Joules, ...] | None = None

    def tokens(self, n: int) -> None:
        """So many tokens were processed since the last call, of prompt or answer alike; by one thread."""
        self._tokens += n

    def end(self) -> tuple[Joules, ...]:
        """The request's joules, at most one entry per source. A second call returns the same."""
        with self._meter.lock:
            if self._energy is None:
                seconds = self._meter.leave(self) - self._began_s
                self._energy = self._meter.labelled(self._joules, seconds)
            return self._energy

    def take_tokens(self) -> int:
        """Those since the last call; for the meter."""
        # The owner may add some meanwhile: it alone writes `_tokens`, so that none is lost.
        tokens = self._tokens
        taken, self._shared_tokens = tokens - self._shared_tokens, tokens
        return taken

    def add(self, drawn: dict[Source, float], share: float) -> None:
        """Its part of what was drawn; for the meter."""
        for source, joules in drawn.items():
            self._joules[source] = self._joules.get(source, 0.0) + share * joules


class EnergyMeter:
    """Shares what the box draws among requests; what is drawn while none is open is idle.

    Whenever a request begins or ends, the joules since the last such moment go to the requests that were
    open, by the tokens that each processed meanwhile, or in equal parts where none did. Every joule goes to
    one request or is idle, so the sum of all is what the sources measured. Counters include what other
    programs draw: a meter takes the box for its own, and two meters count it twice. Safe for several threads.

    Args:
        sources: the parts of the box, each once.
        clock: seconds that only grow.
        wall: Unix time.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._sources = list(sources)
        self._methods = {part.source: part.method for part in sources}
        self._clock, self._wall = clock, wall
        self.lock = threading.RLock()
        self._open: list[Span] = []
        self._spells: list[IdleSpell] = []
        self._at = clock()
        self._total: dict[Source, float] = {part.source: part.joules() for part in sources}
        self._first = dict(self._total)
        self._begin_spell()

    @classmethod
    def open(cls, device: torch.device | None, model: PowerModel = GUESSED) -> EnergyMeter:
        """A meter of this box.

        Args:
            device: the GPU that computes; None or a CPU: no GPU is counted.
            model: stands in for counters that cannot be read.
        """
        return cls(open_sources(device, model))

    def begin(self) -> Span:
        """A request starts to use the box. What was idle until now is closed."""
        with self.lock:
            self._settle()
            if not self._open:
                self._end_spell()
            span = Span(self, self._at, [part.source for part in self._sources])
            self._open.append(span)
            return span

    def idle(self) -> list[IdleSpell]:
        """What was drawn with no request open, since the last call and until now."""
        with self.lock:
            if not self._open:
                self._settle()
                self._end_spell()
                self._begin_spell()
            spells, self._spells = self._spells, []
            return spells

    def measured(self) -> tuple[Joules, ...]:
        """All that the sources have measured up to the last request's begin or end, or call of `idle`."""
        with self.lock:
            drawn = {source: total - self._first[source] for source, total in self._total.items()}
            return self.labelled(drawn, float("inf"))

    def close(self) -> None:
        """Give back the sources; requests that are open keep what they have."""
        with self.lock:
            for part in self._sources:
                part.close()
            self._sources = []

    def leave(self, span: Span) -> float:
        """End a request; for `Span`, under the lock. Returns the clock."""
        self._settle()
        self._open.remove(span)
        if not self._open:
            self._begin_spell()
        return self._at

    def labelled(self, joules: dict[Source, float], seconds: float) -> tuple[Joules, ...]:
        """Joules of a window that long with the way they were obtained."""
        return tuple(
            Joules(source, drawn, self._methods[source](seconds)) for source, drawn in joules.items()
        )

    def _settle(self) -> None:
        """Share out what was drawn since the last call."""
        drawn = self._drawn()
        self._at = self._clock()
        if not self._open:
            for source, joules in drawn.items():
                self._idle[source] = self._idle.get(source, 0.0) + joules
            return
        tokens = [span.take_tokens() for span in self._open]
        whole = sum(tokens)
        for span, count in zip(self._open, tokens, strict=True):
            span.add(drawn, count / whole if whole else 1 / len(self._open))

    def _drawn(self) -> dict[Source, float]:
        """Joules per source since the last call; a source that stops answering is dropped, and named."""
        drawn = {}
        for part in list(self._sources):
            try:
                total = part.joules()
            except DeviceError as error:
                log.warning("energy of %s is not measured from here on: %s", part.source, error)
                self._sources.remove(part)
                continue
            drawn[part.source] = total - self._total[part.source]
            self._total[part.source] = total
        return drawn

    def _begin_spell(self) -> None:
        self._idle: dict[Source, float] = {part.source: 0.0 for part in self._sources}
        self._idle_since, self._idle_begun_s = self._at, self._wall()

    def _end_spell(self) -> None:
        seconds = self._at - self._idle_since
        if seconds > 0 or any(self._idle.values()):
            self._spells.append(IdleSpell(self._idle_begun_s, seconds, self.labelled(self._idle, seconds)))
