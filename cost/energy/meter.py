"""Divides the energy of the box among the requests that are open at the time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moebox.cost.energy.power_model import DEFAULT_POWER, PowerModel
from moebox.cost.energy.power_sources import PowerSource, open_sources
from moebox.cost.usage import IdleSpell, Joules, Source
from moebox.errors import DeviceError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("moebox")


class Span:
    """The time in which one request uses the box; `EnergyMeter.begin` makes it.

    Args:
        meter: measures the energy.
        began_s: the meter's clock at the begin.
        sources: parts of the box that are measured.
    """

    def __init__(self, meter: EnergyMeter, began_s: float, sources: Sequence[Source]) -> None:
        self._meter, self._began_s = meter, began_s
        self._joules: dict[Source, float] = dict.fromkeys(sources, 0.0)
        self._tokens = self._shared_tokens = 0
        self._energy: tuple[Joules, ...] | None = None

    def tokens(self, n: int) -> None:
        """Count `n` more processed tokens, of prompt or answer; call it from one thread only."""
        self._tokens += n

    def end(self) -> tuple[Joules, ...]:
        """End the span; the joules of the request, as in `Usage.energy`. A second call returns the same."""
        with self._meter.lock:
            if self._energy is None:
                seconds = self._meter.leave(self) - self._began_s
                self._energy = self._meter.with_methods(self._joules, seconds)
            return self._energy

    def take_tokens(self) -> int:
        """Tokens counted since the last call; for the meter."""
        # The request's thread may count more meanwhile. Only that thread writes `_tokens`, so none is lost.
        tokens = self._tokens
        taken, self._shared_tokens = tokens - self._shared_tokens, tokens
        return taken

    def add(self, drawn: dict[Source, float], share: float) -> None:
        """Add the request's share of the joules in `drawn`; for the meter."""
        for source, joules in drawn.items():
            self._joules[source] = self._joules.get(source, 0.0) + share * joules


class EnergyMeter:
    """Divides the joules of the box among its requests; joules drawn while no request is open are idle.

    Whenever a request begins or ends, the joules since the last begin or end go to the requests that were
    open:

        share of a request = its tokens since then / tokens of all open requests since then

    or 1 / number of open requests where no token was processed. Every joule goes to one request or is idle,
    so all shares and the idle energy sum to what the sources measured. Counters include the energy of other
    programs, which the requests are charged with; two meters on one box count it twice. Safe for several
    threads.

    Args:
        sources: the parts of the box, each once.
        clock: monotonic seconds.
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
    def open(cls, device: torch.device | None, model: PowerModel = DEFAULT_POWER) -> EnergyMeter:
        """A meter of this box.

        Args:
            device: the GPU that computes; None or a CPU: no GPU is measured.
            model: estimates the energy of parts whose counters cannot be read.
        """
        return cls(open_sources(device, model))

    def begin(self) -> Span:
        """Begin a request, which ends the idle spell if there is one."""
        with self.lock:
            self._divide()
            if not self._open:
                self._end_spell()
            span = Span(self, self._at, [part.source for part in self._sources])
            self._open.append(span)
            return span

    def idle(self) -> list[IdleSpell]:
        """The spells without an open request since the last call, the current one included."""
        with self.lock:
            if not self._open:
                self._divide()
                self._end_spell()
                self._begin_spell()
            spells, self._spells = self._spells, []
            return spells

    def measured(self) -> tuple[Joules, ...]:
        """All joules measured until the last begin or end of a request, or the last call of `idle`."""
        with self.lock:
            drawn = {source: total - self._first[source] for source, total in self._total.items()}
            return self.with_methods(drawn, float("inf"))

    def close(self) -> None:
        """Close the sources; open requests keep the joules that they have."""
        with self.lock:
            for part in self._sources:
                part.close()
            self._sources = []

    def leave(self, span: Span) -> float:
        """End a request; for `Span`, which holds the lock. Returns the clock."""
        self._divide()
        self._open.remove(span)
        if not self._open:
            self._begin_spell()
        return self._at

    def with_methods(self, joules: dict[Source, float], seconds: float) -> tuple[Joules, ...]:
        """Joules by source, with the method of each source for a window of `seconds`."""
        return tuple(
            Joules(source, drawn, self._methods[source](seconds)) for source, drawn in joules.items()
        )

    def _divide(self) -> None:
        """Divide the joules drawn since the last call."""
        drawn = self._drawn()
        self._at = self._clock()
        if not self._open:
            for source, joules in drawn.items():
                self._idle[source] = self._idle.get(source, 0.0) + joules
            return
        tokens = [span.take_tokens() for span in self._open]
        all_tokens = sum(tokens)
        for span, n_tokens in zip(self._open, tokens, strict=True):
            span.add(drawn, n_tokens / all_tokens if all_tokens else 1 / len(self._open))

    def _drawn(self) -> dict[Source, float]:
        """Joules per source since the last call; a source that fails is named in the log and dropped."""
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
            energy = self.with_methods(self._idle, seconds)
            self._spells.append(IdleSpell(self._idle_begun_s, seconds, energy))
