"""Router statistics: what a model's router did, kept in the user's data folder from run to run.

They seed the tiers at start and draw the heat map of `moebox stats`. They decide speed only, never answers,
so nothing that goes wrong with their file stops a run.

Shapes: T tokens, L MoE layers, E n_routed_experts, k num_experts_per_tok; a key is `layer * E + expert`.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebox.errors import RequestError
from moebox.files import locked, replace_file
from moebox.offload.residency import HALF_LIFE_TOKENS as SCORE_HALF_LIFE_TOKENS
from moebox.offload.routing.counts import (
    RECENT_TOKENS,
    Floats,
    Int32s,
    Placement,
    RoutingCounts,
    RoutingTally,
)
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.trace import RoutingTrace

log = logging.getLogger("moebox")

STATISTICS_FILE = "statistics.npz"
SAVE_EVERY_S = 300.0

SEED_SHARE = 0.25
"""Of the score that an expert has on average: what is used now soon counts more than what usually is."""

Stamp = tuple[int, int, int]
PlacementSource = Callable[[], npt.NDArray[np.uint8] | None]


class RouterStatistics:
    """A model's statistics: what its file held when it was opened, and what was seen since.

    A `Sink` of `offload/routing/recorder.py`. Not for several threads at once. Other processes may use the
    same file.

    Args:
        identity: which model.
        path: the file that `save` writes; `open` also reads it.
    """

    def __init__(self, identity: ModelIdentity, path: Path) -> None:
        self.identity = identity
        self.path = path
        self.placement: PlacementSource | None = None
        """Asked when the statistics are saved: where each expert lies, uint8 [L, E] of `counts.TIERS`."""
        self._known = self._nothing()
        self._seen = RoutingTally(*identity.shape)
        self._stamp: Stamp | None = None
        self._saved_s = -math.inf
        self._said = False

    @classmethod
    def open(cls, identity: ModelIdentity, folder: Path | None = None) -> RouterStatistics:
        """A model's statistics from `folder`, by default its own in the user's data folder.

        A file that cannot be read, is damaged or of another model is said and not used; the latter two are
        set aside, so that new statistics can be saved.
        """
        statistics = cls(identity, (folder or identity.folder()) / STATISTICS_FILE)
        try:
            statistics._read_or_set_aside()
        except OSError as error:
            statistics._say(f"cannot be read: {error.strerror or error}; going on without router statistics")
        return statistics

    @property
    def tokens(self) -> int:
        """How many were seen, prompts included, in all runs."""
        return self._known.tokens + self._seen.tokens

    def counts(self) -> RoutingCounts:
        """Everything up to now, with the placement as of now where a model is running."""
        return self._known.followed_by(replace(self._seen.counts(), placement=self._placement()))

    def add(self, ids: Int32s, prefill: bool) -> None:
        """Learn from the picks int32 [T, L, k] of tokens that follow each other.

        Saves after the first prompt, which tells others where experts lie, and later now and then after one:
        for K2 that takes some tenths of a second.
        """
        self._seen.add(ids, prefill)
        if prefill and time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def close(self) -> None:
        """Save."""
        self.save()

    def uses(self, layers: int | slice = slice(None)) -> npt.NDArray[np.float64]:
        """Decayed number of uses of each expert, float64 [L, E], or of some `layers`."""
        uses: npt.NDArray[np.float64] = self._known.uses[layers] * self._seen.discount
        return uses + self._seen.uses[layers] / self._seen.unit

    def order(self) -> list[int]:
        """All keys, the most used first; what was never used comes last, by key."""
        order: list[int] = np.argsort(-self.uses().ravel(), kind="stable").tolist()
        return order

    def seed_scores(self) -> Floats:
        """fp32 [L * E]: `SEED_SHARE` of the score that each key has, on average, in a long run."""
        uses = self.uses()
        per_token = uses / np.maximum(uses.sum(1, keepdims=True), 1e-30) * self.identity.top_k
        scores = SEED_SHARE * per_token / (1 - 0.5 ** (1 / SCORE_HALF_LIFE_TOKENS))
        seeds: Floats = scores.astype(np.float32).ravel()
        return seeds

    def note_recall(self, ahead: int, found: int, picked: int) -> None:
        """Of `picked` experts, a prediction `ahead` (1 or 2) layers before had named `found`."""
        self._seen.recall[ahead - 1] += found, picked

    def recall(self, ahead: int) -> float | None:
        """Share of picks that predictions `ahead` layers before have named; None: nothing was predicted."""
        found, picked = self._known.recall[ahead - 1] + self._seen.recall[ahead - 1]
        return float(found / picked) if picked else None

    def trace(self) -> RoutingTrace | None:
        """The last decoded tokens, up to `RECENT_TOKENS`; None: there are none."""
        recent = np.concatenate([self._known.recent, self._seen.recent()])[-RECENT_TOKENS:]
        if not len(recent):
            return None
        return RoutingTrace(recent.astype(np.int32), self.identity.n_experts, self.identity.name)

    def save(self) -> bool:
        """Write the file, with what other processes wrote meanwhile; returns whether that worked.

        At any moment the file is the old one or the new one, whole. What fails is said once; what was learned
        is kept, and goes into the next save.
        """
        self._saved_s = time.monotonic()
        if not (self._seen.tokens or self._seen.recall.any()):
            return True
        try:
            with locked(self.path):
                if _stamp(self.path) != self._stamp:
                    self._read_or_set_aside()
                self._write(self.counts())
        except OSError as error:
            self._say(f"the router statistics cannot be saved: {error.strerror or error}")
            return False
        return True

    def merge(self, other: RoutingCounts) -> None:
        """Add what was learned elsewhere, and save.

        Raises:
            RequestError: `other` is of another model, or the file cannot be written.
        """
        check_model(other, self.identity)
        with self._changing():
            self._read_or_set_aside()
            self._write(self.counts().beside(other))

    def reset(self) -> None:
        """Forget everything, and remove the file.

        Another process that runs the model saves what it has seen since its own last save.

        Raises:
            RequestError: the file cannot be removed.
        """
        with self._changing():
            self.path.unlink(missing_ok=True)
            self._known = self._nothing()
            self._seen = RoutingTally(*self.identity.shape)
            self._stamp = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            with locked(self.path):
                yield
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be written: {error.strerror or error}") from None

    def _write(self, counts: RoutingCounts) -> None:
        replace_file(self.path, counts.to_bytes())
        self._known, self._seen = counts, RoutingTally(*self.identity.shape)
        self._stamp = _stamp(self.path)

    def _read_or_set_aside(self) -> None:
        """Take what the file holds as known; a file that is of no use makes room for a new one."""
        stamp = _stamp(self.path)  # before reading: a file that is replaced meanwhile is read again
        try:
            known = RoutingCounts.load(self.path)
            check_model(known, self.identity)
        except FileNotFoundError:
            known, stamp = self._nothing(), None
        except RequestError as error:
            self._set_aside(error.what, stamp)
            known, stamp = self._nothing(), None
        self._known, self._stamp = known, stamp

    def _set_aside(self, what: str, stamp: Stamp | None) -> None:
        if _stamp(self.path) != stamp:  # another process has been quicker
            return
        aside = self.path.with_name(f"{self.path.name}.set-aside")
        self.path.replace(aside)
        log.warning("%s; it is now %s, and new statistics begin", what, aside.name)

    def _nothing(self) -> RoutingCounts:
        return RoutingCounts.empty(self.identity.digest, *self.identity.shape)

    def _say(self, message: str) -> None:
        if not self._said:
            log.warning("%s: %s", self.path, message)
        self._said = True

    def _placement(self) -> Placement | None:
        tiers = self.placement() if self.placement else None
        return None if tiers is None else Placement(tiers, time.time(), os.getpid())


def check_model(counts: RoutingCounts, identity: ModelIdentity) -> None:
    """Raise `RequestError` unless `counts` are of this model."""
    shape = (counts.layers, counts.n_experts, counts.top_k)
    if (counts.digest, shape) != (identity.digest, identity.shape):
        raise RequestError(
            f"router statistics of another model: {shape[0]} MoE layers, {shape[1]} experts, top {shape[2]}, "
            f"{counts.digest}; {identity.name} has {', '.join(map(str, identity.shape))}, {identity.digest}"
        )


def _stamp(path: Path) -> Stamp | None:
    """What changes whenever the file is replaced; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
