"""Counts of a router's picks: they decay, are added up, and are stored in a file.

Shapes: L MoE layers, E n_routed_experts, k num_experts_per_tok. `layer` counts MoE layers from 0.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebox.errors import RequestError
from moebox.offload.experts import TIERS
from moebox.offload.routing.trace import NPZ_ERRORS

FILE_FORMAT = 1

STATISTICS_HALF_LIFE_TOKENS = 16384.0
"""Tokens after which a use counts half: more than a conversation has, so that statistics last from one to the
next, and few enough to follow a user whose topics change."""

RECENT_TOKENS = 4096
"""Decoded tokens whose picks are kept one by one, to be replayed."""

PAIRED_TOKENS = 256
"""The most tokens of a prompt's chunk, evenly spread, that count for the pairs of experts."""
SAME_WEIGHT_TOKENS = 64
"""Tokens that are added with one weight; they are few beside the half-life."""
RESCALE_AT_DOUBLINGS = 32.0
"""Doublings of a use's weight after which all sums are scaled down; fp32 has room for 127."""
LAYERS_AHEAD = 2
"""Layers after the current one whose picks are predicted."""

_ARRAYS = ("uses", "last_use", "pairs", "recent", "recall")

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Placement:
    """Where each expert lay when a process saved its statistics.

    Attributes:
        tiers: uint8 [L, E], indices of `experts.TIERS`.
        at_s: the time, in seconds since 1970.
        process: the id of the process.
    """

    tiers: npt.NDArray[np.uint8]
    at_s: float
    process: int


@dataclass(frozen=True)
class RoutingCounts:
    """A model's routing, up to the token of number `tokens`.

    A count decays with the tokens after it: n tokens later it is `2**(-n / STATISTICS_HALF_LIFE_TOKENS)`.

    Attributes:
        digest: `ModelIdentity.digest`.
        top_k: k.
        tokens: tokens seen, those of prompts included.
        uses: float64 [L, E]: decayed counts of each expert's picks.
        last_use: int64 [L, E]: number of the last token that picked the expert; -1: no token did.
        pairs: float32 [L - 1, E, E]: decayed counts of tokens that picked the first expert in a layer and the
            second expert in the next one. Of a prompt's chunk at most `PAIRED_TOKENS` tokens count.
        recent: int16 [n, L, k]: picks of the last decoded tokens, n up to `RECENT_TOKENS`.
        recall: int64 [LAYERS_AHEAD, 2]: for predictions one and two layers ahead, the picks that were
            predicted, and all picks.
        placement: where each expert lay when this was saved; None where no model was loaded.
    """

    digest: str
    top_k: int
    tokens: int
    uses: Doubles
    last_use: Longs
    pairs: Floats
    recent: Shorts
    recall: Longs
    placement: Placement | None = None

    @classmethod
    def empty(cls, digest: str, layers: int, n_experts: int, top_k: int) -> RoutingCounts:
        """The counts of a model that has seen no token."""
        return cls(
            digest,
            top_k,
            0,
            np.zeros((layers, n_experts)),
            np.full((layers, n_experts), -1, np.int64),
            np.zeros((max(0, layers - 1), n_experts, n_experts), np.float32),
            np.empty((0, layers, top_k), np.int16),
            np.zeros((LAYERS_AHEAD, 2), np.int64),
        )

    @property
    def layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.uses.shape[0])

    @property
    def n_experts(self) -> int:
        """E, the number of routed experts of a layer."""
        return int(self.uses.shape[1])

    def aged(self, tokens: int) -> RoutingCounts:
        """These counts, decayed by `tokens` more tokens of which no pick is counted."""
        factor = 0.5 ** (tokens / STATISTICS_HALF_LIFE_TOKENS)
        return replace(
            self,
            tokens=self.tokens + tokens,
            uses=self.uses * factor,
            pairs=self.pairs * np.float32(factor),
        )

    def followed_by(self, newer: RoutingCounts) -> RoutingCounts:
        """These counts and those of the tokens that followed; `newer`'s placement, where it has one."""
        aged = self.aged(newer.tokens)
        later = np.where(newer.last_use >= 0, newer.last_use + self.tokens, -1)
        return aged._plus(newer, np.maximum(self.last_use, later))

    def beside(self, other: RoutingCounts) -> RoutingCounts:
        """These counts and those of another process or box, as if the last tokens of both were the same."""
        tokens = self.tokens + other.tokens
        moved = [np.where(one.last_use >= 0, one.last_use + tokens - one.tokens, -1) for one in (self, other)]
        # The other's decoded tokens count as the older ones.
        recent = np.concatenate([other.recent, self.recent])[-RECENT_TOKENS:]
        merged = replace(self, tokens=tokens)._plus(other, np.maximum(*moved))
        return replace(merged, recent=recent, placement=self.placement)

    def _plus(self, other: RoutingCounts, last_use: Longs) -> RoutingCounts:
        return replace(
            self,
            uses=self.uses + other.uses,
            last_use=last_use,
            pairs=self.pairs + other.pairs,
            recent=np.concatenate([self.recent, other.recent])[-RECENT_TOKENS:],
            recall=self.recall + other.recall,
            placement=other.placement or self.placement,
        )

    def to_bytes(self) -> bytes:
        """The bytes of an uncompressed .npz file, whose checksums show damage."""
        file = io.BytesIO()
        placed = self.placement
        np.savez(
            file,
            format=FILE_FORMAT,
            digest=self.digest,
            top_k=self.top_k,
            tokens=self.tokens,
            **{name: getattr(self, name) for name in _ARRAYS},
            tiers=placed.tiers if placed else np.empty((0, 0), np.uint8),
            placed=np.array([placed.at_s, placed.process] if placed else [0, 0], np.float64),
        )
        return file.getvalue()

    @classmethod
    def load(cls, path: Path) -> RoutingCounts:
        """Read the file at `path`.

        Raises:
            OSError: the file cannot be read.
            RequestError: as `from_bytes`; the message names the file.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except RequestError as error:
            raise RequestError(f"{path}: {error.what}") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> RoutingCounts:
        """Read what `to_bytes` returned.

        Raises:
            RequestError: damaged, of another format, or no router statistics; the message names no file.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as fields:
                version = int(fields["format"])
                if version != FILE_FORMAT:
                    raise RequestError(f"format {version}; this version of moebox reads {FILE_FORMAT}")
                counts = cls(
                    str(fields["digest"]),
                    int(fields["top_k"]),
                    int(fields["tokens"]),
                    **{name: fields[name] for name in _ARRAYS},
                    placement=_placement(fields["tiers"], fields["placed"]),
                )
        except NPZ_ERRORS as error:
            raise RequestError(f"not router statistics, or damaged: {error}") from None
        counts._check()
        return counts

    def _check(self) -> None:
        """Raise `RequestError` where a shape, a dtype or a value is impossible."""
        if self.uses.ndim != 2:
            raise RequestError(f"not router statistics: uses {list(self.uses.shape)}")
        like = RoutingCounts.empty(self.digest, self.layers, self.n_experts, max(self.top_k, 0))
        for name in _ARRAYS:
            value, expected = getattr(self, name), getattr(like, name)
            shape = (len(value), *expected.shape[1:]) if name == "recent" else expected.shape
            if value.dtype != expected.dtype or value.shape != shape:
                raise RequestError(f"not router statistics: {name} {value.dtype} {list(value.shape)}")
        tiers = None if self.placement is None else self.placement.tiers
        if tiers is not None and (tiers.shape != self.uses.shape or tiers.max(initial=0) >= len(TIERS)):
            raise RequestError("not router statistics: placement")
        in_range = (
            np.isfinite(self.uses).all() and self.uses.min(initial=0) >= 0 and self.tokens >= 0
            and np.isfinite(self.pairs).all() and self.pairs.min(initial=0) >= 0
            and self.last_use.max(initial=-1) < max(self.tokens, 1) and self.last_use.min(initial=-1) >= -1
            and self.recent.min(initial=0) >= 0 and self.recent.max(initial=0) < self.n_experts
        )  # fmt: skip
        if not in_range:
            raise RequestError("router statistics with values that cannot be")


def _placement(tiers: npt.NDArray[np.uint8], placed: Doubles) -> Placement | None:
    return Placement(tiers, float(placed[0]), int(placed[1])) if tiers.size else None


class RoutingTally:
    """Counts of the tokens since the statistics' file was last read or written.

    A use by token t adds `2**(t / STATISTICS_HALF_LIFE_TOKENS - scaled)`: the weight grows, so that earlier
    sums need no update. Divided by `unit`, the weight of a use now, the sums are decayed counts.

    Args:
        layers, n_experts, top_k: L, E and k.

    Attributes:
        tokens: tokens counted.
        uses, pairs, last_use, recall: as in `RoutingCounts`, but `uses` and `pairs` are sums of weights.
    """

    def __init__(self, layers: int, n_experts: int, top_k: int) -> None:
        self.tokens = 0
        self.uses = np.zeros((layers, n_experts))
        self.pairs: Floats = np.zeros((max(0, layers - 1), n_experts, n_experts), np.float32)
        self.last_use: Longs = np.full((layers, n_experts), -1, np.int64)
        self.recall: Longs = np.zeros((LAYERS_AHEAD, 2), np.int64)
        self._recent: list[Shorts] = []
        self._recent_tokens = 0
        self._top_k = top_k
        self._first_key = (np.arange(layers, dtype=np.int32) * n_experts)[:, None]
        self._first_pair = (np.arange(max(0, layers - 1)) * n_experts**2)[:, None, None]
        self._scaled = 0.0

    @property
    def unit(self) -> float:
        """The weight with which a use is added now."""
        return float(2.0 ** (self.tokens / STATISTICS_HALF_LIFE_TOKENS - self._scaled))

    @property
    def discount(self) -> float:
        """Decay of counts from before these tokens."""
        return float(0.5 ** (self.tokens / STATISTICS_HALF_LIFE_TOKENS))

    def counts(self) -> RoutingCounts:
        """The decayed counts; their digest is left empty."""
        return RoutingCounts(
            "",
            self._top_k,
            self.tokens,
            self.uses / self.unit,
            self.last_use,
            self.pairs / np.float32(self.unit),
            self.recent(),
            self.recall,
        )

    def recent(self) -> Shorts:
        """Picks int16 [n, L, k] of the last decoded tokens."""
        none = np.empty((0, len(self.uses), self._top_k), np.int16)
        return np.concatenate([none, *self._recent])[-RECENT_TOKENS:]

    def add(self, ids: Int32s, prefill: bool) -> None:
        """Count the picks int32 [T, L, k] of tokens that follow each other, of a prompt or decoded."""
        paired_every = -(-len(ids) // PAIRED_TOKENS) if prefill else 1
        for start in range(0, len(ids), SAME_WEIGHT_TOKENS):
            self._add_with_one_weight(ids[start : start + SAME_WEIGHT_TOKENS], paired_every)
        if not prefill:
            self._remember(ids)

    def _add_with_one_weight(self, ids: Int32s, paired_every: int) -> None:
        self._rescale()
        unit = self.unit
        keys = ids + self._first_key
        self.uses += unit * np.bincount(keys.ravel(), minlength=self.uses.size).reshape(self.uses.shape)
        # Where a key is repeated, numpy keeps the last value assigned: the latest token's.
        numbers = np.arange(self.tokens, self.tokens + len(ids))
        self.last_use.reshape(-1)[keys.ravel()] = np.repeat(numbers, keys[0].size)
        paired = ids[::paired_every].astype(np.int64)
        pairs = paired[:, :-1, :, None] * self.uses.shape[1] + paired[:, 1:, None, :] + self._first_pair
        np.add.at(self.pairs.reshape(-1), pairs.ravel(), np.float32(unit))
        self.tokens += len(ids)

    def _rescale(self) -> None:
        excess = self.tokens / STATISTICS_HALF_LIFE_TOKENS - self._scaled
        if excess > RESCALE_AT_DOUBLINGS:
            self.uses *= 0.5**excess
            self.pairs *= np.float32(0.5**excess)
            self._scaled += excess

    def _remember(self, ids: Int32s) -> None:
        self._recent.append(ids[-RECENT_TOKENS:].astype(np.int16))
        self._recent_tokens += len(ids)
        if self._recent_tokens > 2 * RECENT_TOKENS:
            self._recent = [np.concatenate(self._recent)[-RECENT_TOKENS:]]
            self._recent_tokens = RECENT_TOKENS
