"""Whether uploads on a guess pay, found out while tokens are decoded, and what came of them.

What they are is in `roads` and `csrc/ahead.h`.
"""

from __future__ import annotations

import logging
from typing import Protocol

from moebox.offload.decode.host_step import AHEAD_FIELDS, DecodeRoads
from moebox.offload.prefetch.ab_trial import Trial
from moebox.offload.prefetch.prefetch import PrefetchReport

log = logging.getLogger("moebox")


class Decides(Protocol):
    """What `UploadsAhead` needs of a `Trial`."""

    @property
    def on(self) -> bool: ...
    @property
    def trying(self) -> bool: ...
    @property
    def change(self) -> float | None: ...
    @property
    def why_off(self) -> str: ...
    def observe(self, seconds: float, to_read: int) -> bool: ...


class UploadsAhead:
    """Decides for each token whether the GPU guesses, by a trial that goes on while tokens are decoded."""

    def __init__(self, roads: DecodeRoads, trial: Decides | None = None) -> None:
        self._roads = roads
        self._trial = Trial() if trial is None else trial
        self._said = False

    @property
    def on(self) -> bool:
        """Whether the coming token goes with guesses."""
        return self._trial.on

    def observe(self, seconds: float, misses: int) -> None:
        """A token took so long, `misses` of its experts not being on the GPU; said once: they do not pay."""
        decided = self._trial.observe(seconds, misses)
        if decided and not self._trial.on and not self._trial.trying and not self._said:
            self._said = True
            log.warning("uploads on a guess are off: %s", self._trial.why_off)

    def report(self) -> PrefetchReport:
        """What was done so far; a copy."""
        done = dict(zip(AHEAD_FIELDS, self._roads.ahead.tolist(), strict=True))
        report = PrefetchReport(
            issued=done["issued"],
            used=done["used"],
            late=done["late"],
            wrong=done["wrong"],
            wasted_bytes=done["wasted_bytes"],
            on=self._trial.on or self._trial.trying,
            change=self._trial.change,
        )
        report.found[1], report.picked[1] = done["found"], done["picked"]
        if not report.on:
            report.why_off = self._trial.why_off
        return report
