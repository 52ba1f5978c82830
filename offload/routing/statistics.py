"""Router statistics: which experts a model's router picked, kept in the user's data folder from run to run.

They decide where experts lie when a model is loaded, and `moebox stats` shows them. They affect speed only,
never answers, so no fault of their file stops a run.

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
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS
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
"""Least time between two saves that prompts cause."""
SEED_SHARE = 0.25
"""Share of its average score with which an expert starts, so that the picks of the current run soon count
more than those of earlier runs."""

Stamp = tuple[int, int, int]
"""Inode, modification time and size of a file: they differ after the file was replaced."""
PlacementSource = Callable[[], npt.NDArray[np.uint8] | None]
"""Where each expert lies now, uint8 [L, E] of indices of `experts.TIERS`; None: the model is gone."""


class RouterStatistics:
    """A model's statistics: those of its file, and what was recorded since.

    Implements `Sink` of `offload/routing/recorder.py`. Not thread-safe. Other processes may use the same
    file.

    Args:
        identity: the model's.
        path: the file that `save` writes. `open` reads it, too.

    Attributes:
        identity, path: as given.
        placement: returns where the experts lie; called at each save. None: no model is loaded.
    """

    def __init__(self, identity: ModelIdentity, path: Path) -> None:
        self.identity = identity
        self.path = path
        self.placement: PlacementSource | None = None
        self._known = self._nothing()
        self._seen = RoutingTally(*identity.shape)
        self._stamp: Stamp | None = None
        self._saved_s = -math.inf
        self._warned = False

    @classmethod
    def open(cls, identity: ModelIdentity, folder: Path | None = None) -> RouterStatistics:
        """Read a model's statistics from `folder`, by default the model's in the user's data folder.

        A file that cannot be read, is damaged or is of another model is not used, and a warning says so. In
        the latter two cases the file is renamed, so that new statistics can be saved.
        """
        statistics = cls(identity, (folder or identity.folder()) / STATISTICS_FILE)
        try:
            statistics._read_or_set_aside()
        except OSError as error:
            statistics._warn_once(
                f"cannot be read: {error.strerror or error}; going on without router statistics"
            )
        return statistics

    @property
    def tokens(self) -> int:
        """Tokens of all runs, those of prompts included."""
        return self._known.tokens + self._seen.tokens

    def counts(self) -> RoutingCounts:
        """The counts of all runs up to now, with the current placement where a model is loaded."""
        return self._known.followed_by(replace(self._seen.counts(), placement=self._placement()))

    def add(self, ids: Int32s, prefill: bool) -> None:
        # The first prompt saves, so that other processes see the placement. Later prompts seldom do, because
        # for K2 saving takes some tenths of a second.
        self._seen.add(ids, prefill)
        if prefill and time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def close(self) -> None:
        """Save."""
        self.save()

    def uses(self) -> npt.NDArray[np.float64]:
        """Decayed counts of each expert's picks, float64 [L, E]."""
        uses: npt.NDArray[np.float64] = self._known.uses * self._seen.discount
        return uses + self._seen.uses / self._seen.unit

    def order(self) -> list[int]:
        """All keys, the most used first; keys with equal counts are in ascending order."""
        order: list[int] = np.argsort(-self.uses().ravel(), kind="stable").tolist()
        return order

    def seed_scores(self) -> Floats:
        """Scores for a cache that was just loaded: fp32 [L * E].

        An expert that is picked with probability p at each token has the average score
        `p / (1 - 2**(-1 / SCORE_HALF_LIFE_TOKENS))` in a long run; the seed is `SEED_SHARE` of it.
        """
        uses = self.uses()
        per_token = uses / np.maximum(uses.sum(1, keepdims=True), 1e-30) * self.identity.top_k
        scores = SEED_SHARE * per_token / (1 - 0.5 ** (1 / SCORE_HALF_LIFE_TOKENS))
        seeds: Floats = scores.astype(np.float32).ravel()
        return seeds

    def note_recall(self, ahead: int, found: int, picked: int) -> None:
        """Count a prediction, made `ahead` (1 or 2) layers before, that named `found` of `picked` picks."""
        self._seen.recall[ahead - 1] += found, picked

    def recall(self, ahead: int) -> float | None:
        """Share of picks that predictions `ahead` layers before named; None: there was no prediction."""
        found, picked = self._known.recall[ahead - 1] + self._seen.recall[ahead - 1]
        return float(found / picked) if picked else None

    def trace(self) -> RoutingTrace | None:
        """The picks of the last decoded tokens, up to `RECENT_TOKENS`; None: no token was decoded."""
        recent = np.concatenate([self._known.recent, self._seen.recent()])[-RECENT_TOKENS:]
        if not len(recent):
            return None
        return RoutingTrace(recent.astype(np.int32), self.identity.n_experts, self.identity.name)

    def save(self) -> bool:
        """Write the file, with what other processes have written since; returns whether it was written.

        The file is replaced at once: at any moment it is the old one or the new one. The first failure is
        logged; the counts stay, and are part of the next save.
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
            self._warn_once(f"the router statistics cannot be saved: {error.strerror or error}")
            return False
        return True

    def merge(self, other: RoutingCounts) -> None:
        """Add the counts of another process or box, and save.

        Raises:
            RequestError: `other` is of another model, or the file cannot be written.
        """
        check_model(other, self.identity)
        with self._changing():
            self._read_or_set_aside()
            self._write(self.counts().beside(other))

    def reset(self) -> None:
        """Delete all counts, and remove the file.

        Another process that runs the model will still save what it has counted since its last save.

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
        """Read the known counts from the file; a file that cannot be used is renamed."""
        stamp = _stamp(self.path)  # before reading: a file that is replaced while it is read is read again
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
        if _stamp(self.path) != stamp:  # another process has replaced it
            return
        aside = self.path.with_name(f"{self.path.name}.set-aside")
        self.path.replace(aside)
        log.warning("%s; it is now %s, and new statistics begin", what, aside.name)

    def _nothing(self) -> RoutingCounts:
        return RoutingCounts.empty(self.identity.digest, *self.identity.shape)

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            log.warning("%s: %s", self.path, message)
        self._warned = True

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
    """The file's stamp; None: there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
