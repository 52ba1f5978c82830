"""Experts that the next layers will probably pick are read before these layers are routed.

While one token is decoded, a drive idles whenever attention, shared expert and hits are computed. Reads that
a prediction asks for fill that time: behind all reads that are waited for, into free rows only, and given up
as soon as they are known to be wrong. Rows that a layer needs come from speculation before they come from
residents.

Shapes: H hidden_size, k num_experts_per_tok; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.prefetch.ab_trial import Trial
from moebox.offload.routing.statistics import RouterStatistics

log = logging.getLogger("moebox")

LAYERS_AHEAD = 2


class Predictor(Protocol):
    """Guesses what layers to come will pick."""

    def predict(self, moe: int, hidden: Tensor) -> Iterator[tuple[int, list[int]]]:
        """What the layers after MoE layer `moe` will probably pick; each is worked out when it is asked for.

        Args:
            moe: index of an MoE layer, from 0.
            hidden: [1, H], what its router saw.

        Returns:
            (layers ahead, expert ids, the likeliest first) for each layer, the nearest first: at least k ids;
            a read that was begun earlier goes on if it is for one of them.
        """
        ...


@dataclass
class PrefetchReport:
    """What prefetching did.

    Attributes:
        issued: reads begun on a guess.
        used: of these, had ended when their expert was picked.
        late: were still under way when it was picked, which then waits less.
        wrong: were not picked.
        wasted_bytes: read for the wrong ones.
        found, picked: by layers ahead (1, 2): picks that the k likeliest experts of a prediction named, and
            all picks that there was a prediction for.
        on: whether it is on now; between tokens of a trial also when the next one goes without.
        change: of a token's time, relative, by prefetching; None: not known yet.
        why_off: why it is off; empty where it is on.
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
        """By layers ahead: share of picks that predictions had named; None: there were none."""
        return {
            ahead: self.found[ahead] / picked if picked else None for ahead, picked in self.picked.items()
        }


class Prefetcher:
    """Speculative reads while tokens are decoded; see the module.

    For each layer of a token, in order, `begin_layer` comes before its reads are demanded, `submitted` after
    that, and `end_layer` when it is computed; `end_token` after the last. A token that was broken off may
    leave the latter out.

    Attributes:
        trial: decides whether prefetching pays; may be exchanged between tokens.
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
            cache: whose rows are read into.
            predictor: what to read.
            statistics: told how good the predictions are.
            n_experts: E.
            trial: decides whether prefetching pays.
        """
        self._cache, self._predictor, self._statistics = cache, predictor, statistics
        self._n_experts = n_experts
        self.trial = trial or Trial()
        self._said = False
        self._done = PrefetchReport()
        self._begun_s: float | None = None
        self._to_read = 0
        self._active = False
        self._predicted: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
        self._reading: dict[int, None] = {}

    def begin_layer(self, moe: int, picks: Sequence[int]) -> None:
        """MoE layer `moe` was routed to the experts `picks`: accounts for what was read for it."""
        if moe == 0:
            self._begin_token()
        keys = [moe * self._n_experts + expert for expert in picks]
        self._to_read += sum(not self._cache.resident(key) for key in keys)
        if self._active:
            self._compare(moe, picks)
            if self._reading:
                self._sort_out(moe, keys)

    def submitted(self, moe: int, hidden: Tensor, picks: Sequence[int]) -> None:
        """The reads of MoE layer `moe`, routed from `hidden` [1, H], are queued: reads for those to come."""
        if not self._active:
            return
        if self._reading:
            self._drop(key for key in self._reading if key < (moe + 1) * self._n_experts)
        for ahead, named in self._predictor.predict(moe, hidden):
            if ahead > 1 and not self._cache.n_spare:
                return
            self._predicted[moe + ahead].append((ahead, named[: len(picks)]))
            self._speculate(moe + ahead, named, len(picks))

    def end_layer(self, moe: int) -> None:
        """MoE layer `moe` is computed, and rows are free again: what there was no room for is read now."""
        for _, named in self._predicted.get(moe + 1, [])[-1:]:
            self._read((moe + 1) * self._n_experts + expert for expert in named)

    def end_token(self) -> None:
        """The token's last layer is computed."""
        self._drop(self._reading)
        if self._begun_s is None:
            return
        seconds, self._begun_s = time.perf_counter() - self._begun_s, None
        if self.trial.observe(seconds, self._to_read) and not self.trial.on and not self._said:
            self._said = True
            log.warning("prefetch is off: %s", self.trial.why_off)

    def report(self) -> PrefetchReport:
        """What was done so far; a copy."""
        on = self.trial.on or self.trial.trying
        return replace(
            self._done,
            found=dict(self._done.found),
            picked=dict(self._done.picked),
            on=on,
            change=self.trial.change,
            why_off="" if on else self.trial.why_off,
        )

    def _begin_token(self) -> None:
        self._drop(self._reading)  # of a token that was broken off
        self._predicted.clear()
        self._active, self._to_read = self.trial.on, 0
        self._begun_s = time.perf_counter()

    def _compare(self, moe: int, picks: Sequence[int]) -> None:
        """How many of the picks each earlier prediction had named."""
        for ahead, named in self._predicted.pop(moe, []):
            found = len(set(named).intersection(picks))
            self._done.found[ahead] += found
            self._done.picked[ahead] += len(picks)
            if self._statistics is not None:
                self._statistics.note_recall(ahead, found, len(picks))

    def _sort_out(self, moe: int, keys: list[int]) -> None:
        """Count what was right; free the rows of what was wrong, unless that means to wait for the drive."""
        for key in keys:
            if key in self._reading:
                del self._reading[key]
                ready = self._cache.ready(key)
                self._done.used += ready
                self._done.late += not ready
        end = (moe + 1) * self._n_experts
        self._drop(key for key in self._reading if key < end and self._cache.ready(key))
        missing = sum(self._cache.row(key) < 0 for key in keys)
        wrong = [key for key in self._reading if key < end]
        later = [key for key in self._reading if key >= end]
        for key in wrong + later[::-1]:  # of the next layers the unlikeliest first
            if self._cache.n_spare < missing:
                self._drop([key])

    def _speculate(self, moe: int, experts: list[int], count: int) -> None:
        """Begin to read the first `count` of these experts, the likeliest first; give others up."""
        first = moe * self._n_experts
        keys = [first + expert for expert in experts]
        end = first + self._n_experts
        if self._reading:
            self._drop(key for key in self._reading if first <= key < end and key not in keys)
        self._read(keys[:count])

    def _read(self, keys: Iterable[int]) -> None:
        for key in keys:
            if self._cache.speculate(key):
                self._reading[key] = None
                self._done.issued += 1

    def _drop(self, keys: Iterable[int]) -> None:
        """Give these reads up."""
        for key in list(keys):
            del self._reading[key]
            self._done.wrong += 1
            self._done.wasted_bytes += self._cache.drop(key)
