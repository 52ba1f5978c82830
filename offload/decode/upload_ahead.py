"""Decides by a trial whether uploading ahead pays while tokens are decoded, and reports its counts.

`csrc/decode/upload_ahead.h` describes uploading ahead.
"""

from __future__ import annotations

import logging
from typing import Protocol

from moebox.offload.decode.host_step import AHEAD_FIELDS, DecodeHost
from moebox.offload.prefetch.ab_trial import Trial
from moebox.offload.prefetch.prefetch import PrefetchReport

log = logging.getLogger("moebox")


class OnOffTrial(Protocol):
    """What `UploadAheadTrial` needs of a `Trial`."""

    @property
    def on(self) -> bool: ...
    @property
    def trying(self) -> bool: ...
    @property
    def change(self) -> float | None: ...
    @property
    def why_off(self) -> str: ...
    def observe(self, seconds: float, to_read: int) -> bool: ...


class UploadAheadTrial:
    """Decides for each token whether the GPU predicts, by a trial that goes on while tokens are decoded."""

    def __init__(self, host: DecodeHost, trial: OnOffTrial | None = None) -> None:
        self._host = host
        self._trial = Trial() if trial is None else trial
        self._off_logged = False

    @property
    def on(self) -> bool:
        """Whether the GPU predicts at the coming token."""
        return self._trial.on

    def observe(self, seconds: float, misses: int) -> None:
        """Take into account a token that took `seconds` and had so many experts that were not on the GPU.

        Logs once that uploading ahead does not pay.
        """
        decided = self._trial.observe(seconds, misses)
        if decided and not self._trial.on and not self._trial.trying and not self._off_logged:
            self._off_logged = True
            log.warning("uploading ahead is off: %s", self._trial.why_off)

    def report(self) -> PrefetchReport:
        """Counts of all tokens so far; a copy."""
        counts = dict(zip(AHEAD_FIELDS, self._host.ahead_counts.tolist(), strict=True))
        report = PrefetchReport(
            issued=counts["issued"],
            used=counts["used"],
            late=counts["late"],
            wrong=counts["wrong"],
            wasted_bytes=counts["wasted_bytes"],
            on=self._trial.on or self._trial.trying,
            change=self._trial.change,
        )
        report.found[1], report.picked[1] = counts["found"], counts["picked"]
        if not report.on:
            report.why_off = self._trial.why_off
        return report
