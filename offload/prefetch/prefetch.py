"""Prefetching: experts that the next layers will probably pick are read before these layers are routed.

While a token is decoded, the drive is idle as long as attention, shared expert and experts in RAM are
computed. Prefetches fill that time. They are read when no other read is queued, go to free rows only, and are
cancelled as soon as they are known to be wrong. A layer that needs rows takes those of prefetches before it
evicts an expert.

Shapes: H hidden_size, k num_experts_per_tok; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.prefetch.ab_trial import Trial
from moebox.offload.prefetch.base import Predictor
from moebox.offload.routing.counts import LAYERS_AHEAD
from moebox.offload.routing.statistics import RouterStatistics

log = logging.getLogger("moebox")


@dataclass
class PrefetchReport:
    """What prefetching, or uploading ahead, did.

    Attributes:
        issued: prefetches begun.
        used: prefetches that were complete when their expert was picked.
        late: prefetches that were under way when their expert was picked; the wait for the read is shorter.
        wrong: prefetches whose expert was not picked.
        wasted_bytes: read for the wrong ones.
        found, picked: by layers ahead (1, 2): picks that were among the k likeliest experts of a prediction,
            and all picks of layers that there was a prediction for.
        on: whether the feature is on now, or a trial is going on.
        change: relative change of a token's time by the feature; negative: faster. None: not measured yet.
        why_off: why the feature is off; empty where it is on.
    """

    issued: int = 0
    used: int = 0
    late: int = 0
    wrong: int = 0
    wasted_bytes: int = 0
    found: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(1, LAYERS_AHEAD + 1), 0))
    picked: dict[int, int] = field(default_factory=lambda: dict.fromkeys(range(1, LAYERS_AHEAD + 1), 0))
    on: bool = True
    change: float | None = None
    why_off: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All figures, and the recall."""
        return asdict(self) | {"recall": self.recall}

    @property
    def recall(self) -> dict[int, float | None]:
        """By layers ahead: share of the picks that were predicted; None: there was no prediction."""
        return {
            ahead: self.found[ahead] / picked if picked else None for ahead, picked in self.picked.items()
        }


class Prefetcher:
    """Implements `TokenPrefetcher`.

    For each layer of a token, in order, the decode loop calls `begin_layer` before it demands the layer's
    experts, `prefetch_next` after that, and `end_layer` when the layer is computed; after the last layer it
    calls `end_token`. A token that fails may end at any of these calls.

    Attributes:
        trial: decides whether prefetching is on; may be replaced between tokens.
    """

    def __init__(
        self,
        cache: RamCache,
        predictor: Predictor,
        statistics: RouterStatistics | None,
        n_experts: int,
        trial: Trial | None = None,
    ) -> None:
        """
        Args:
            cache: prefetches are read into its free rows.
            predictor: names the experts to read.
            statistics: records the recall of the predictions.
            n_experts: E.
            trial: decides whether prefetching is on.
        """
        self._cache, self._predictor, self._statistics = cache, predictor, statistics
        self._n_experts = n_experts
        self.trial = trial or Trial()
        self._logged = False
        self._report = PrefetchReport()
        self._begun_s: float | None = None
        self._to_read = 0
        self._active = False
        self._predicted: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        self._reading: dict[int, None] = {}

    def begin_layer(self, moe: int, picks: Sequence[int]) -> None:
        """Count which prefetches were right, now that MoE layer `moe` is routed to the experts `picks`, and
        cancel the others where their rows are needed."""
        if moe == 0:
            self._begin_token()
        keys = [moe * self._n_experts + expert for expert in picks]
        self._to_read += sum(not self._cache.in_ram(key) for key in keys)
        if self._active:
            self._count_recall(moe, picks)
            if self._reading:
                self._use(moe, keys)

    def prefetch_next(self, moe: int, hidden: Tensor, picks: Sequence[int]) -> None:
        """Predict the layers after MoE layer `moe` from its router's input `hidden` [1, H], and begin reads.

        The layer's own reads are queued before.
        """
        if not self._active:
            return
        if self._reading:
            self._cancel(key for key in self._reading if key < (moe + 1) * self._n_experts)
        for ahead, named in self._predictor.predict(moe, hidden):
            if ahead > 1 and not self._cache.n_free:
                return
            self._predicted[moe + ahead].append((ahead, named[: len(picks)]))
            self._prefetch(moe + ahead, named, len(picks))

    def end_layer(self, moe: int) -> None:
        """MoE layer `moe` is computed, and rows are free: begin prefetches that found no free row before."""
        for _, named in self._predicted.get(moe + 1, [])[-1:]:
            self._read((moe + 1) * self._n_experts + expert for expert in named)

    def end_token(self) -> None:
        """The token's last layer is computed: have the trial take in its time."""
        self._cancel(self._reading)
        if self._begun_s is None:
            return
        seconds, self._begun_s = time.perf_counter() - self._begun_s, None
        if self.trial.observe(seconds, self._to_read) and not self.trial.on and not self._logged:
            self._logged = True
            log.warning("prefetch is off: %s", self.trial.why_off)

    def report(self) -> PrefetchReport:
        """What prefetching did so far; a copy."""
        on = self.trial.on or self.trial.trying
        return replace(
            self._report,
            found=dict(self._report.found),
            picked=dict(self._report.picked),
            on=on,
            change=self.trial.change,
            why_off="" if on else self.trial.why_off,
        )

    def _begin_token(self) -> None:
        self._cancel(self._reading)  # of a token that failed
        self._predicted.clear()
        self._active, self._to_read = self.trial.on, 0
        self._begun_s = time.perf_counter()

    def _count_recall(self, moe: int, picks: Sequence[int]) -> None:
        for ahead, named in self._predicted.pop(moe, []):
            found = len(set(named).intersection(picks))
            self._report.found[ahead] += found
            self._report.picked[ahead] += len(picks)
            if self._statistics is not None:
                self._statistics.note_recall(ahead, found, len(picks))

    def _use(self, moe: int, keys: list[int]) -> None:
        """Count the layer's prefetches that were right, and cancel others until its misses have free rows.

        A wrong prefetch whose read has ended is cancelled in any case; to cancel one that is under way waits
        for the drive.
        """
        for key in keys:
            if key in self._reading:
                del self._reading[key]
                ready = self._cache.ready(key)
                self._report.used += ready
                self._report.late += not ready
        end = (moe + 1) * self._n_experts
        self._cancel(key for key in self._reading if key < end and self._cache.ready(key))
        missing = sum(self._cache.row(key) < 0 for key in keys)
        wrong = [key for key in self._reading if key < end]
        later = [key for key in self._reading if key >= end]
        for key in wrong + later[::-1]:  # of the next layers the least likely first
            if self._cache.n_free < missing:
                self._cancel([key])

    def _prefetch(self, moe: int, experts: list[int], count: int) -> None:
        """Begin to read the first `count` of these experts, the likeliest first.

        Cancels prefetches of the layer whose experts are not among these.
        """
        first = moe * self._n_experts
        keys = [first + expert for expert in experts]
        end = first + self._n_experts
        if self._reading:
            self._cancel(key for key in self._reading if first <= key < end and key not in keys)
        self._read(keys[:count])

    def _read(self, keys: Iterable[int]) -> None:
        for key in keys:
            if self._cache.prefetch(key):
                self._reading[key] = None
                self._report.issued += 1

    def _cancel(self, keys: Iterable[int]) -> None:
        for key in list(keys):
            del self._reading[key]
            self._report.wrong += 1
            self._report.wasted_bytes += self._cache.cancel_prefetch(key)
