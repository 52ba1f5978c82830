"""What was learned of a router, as numbers: aged, added up, and turned into a file's bytes and back.

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

HALF_LIFE_TOKENS = 16384.0
"""Tokens after which a use counts half: statistics outlive a conversation, but not the user's habits."""

RECENT_TOKENS = 4096
"""Decoded tokens whose picks are kept whole, to be replayed."""

PAIRED_TOKENS = 256
"""Of a longer prompt's chunk so many tokens, evenly spread, count for which expert follows which."""
PART_TOKENS = 64
"""Tokens that are added with one weight: few beside the half-life."""
RESCALE_AT = 32.0
"""Doublings of the weight of a use after which all weights are brought down again: fp32 ends at 127."""

LAYERS_AHEAD = 2


_ARRAYS = ("uses", "last_use", "pairs", "recent", "recall")

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]
Shorts = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Placement:
    """Where each expert lay.

    Attributes:
        tiers: uint8 [L, E], an index of `TIERS`.
        at_s: when, in seconds since 1970.
        process: whose.
    """

    tiers: npt.NDArray[np.uint8]
    at_s: float
    process: int


@dataclass(frozen=True)
class RoutingCounts:
    """A model's routing up to some token.

    Attributes:
        digest: of the model.
        top_k: k.
        tokens: how many were seen, prompts included.
        uses: float64 [L, E]: how often each expert was picked, decayed to now.
        last_use: int64 [L, E]: number of the token that last picked it, -1: none did.
        pairs: float32 [L - 1, E, E]: how often a token that picked the first expert picked the second one
            layer on, decayed to now. Of long prompts some tokens only.
        recent: int16 [n, L, k]: picks of the last decoded tokens, n up to `RECENT_TOKENS`.
        recall: int64 [2, 2]: one and two layers ahead, picks that a prediction had named, and all picks.
        placement: where each expert lay when this was saved, if a model was running.
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
        """Nothing seen yet."""
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
        """L."""
        return int(self.uses.shape[0])

    @property
    def n_experts(self) -> int:
        """E."""
        return int(self.uses.shape[1])

    def aged(self, tokens: int) -> RoutingCounts:
        """The same after so many more tokens without anything learned from them."""
        factor = 0.5 ** (tokens / HALF_LIFE_TOKENS)
        return replace(
            self,
            tokens=self.tokens + tokens,
            uses=self.uses * factor,
            pairs=self.pairs * np.float32(factor),
        )

    def followed_by(self, newer: RoutingCounts) -> RoutingCounts:
        """These, and then what `newer` saw; the placement is `newer`'s where it has one."""
        aged = self.aged(newer.tokens)
        later = np.where(newer.last_use >= 0, newer.last_use + self.tokens, -1)
        return aged._plus(newer, np.maximum(self.last_use, later))

    def beside(self, other: RoutingCounts) -> RoutingCounts:
        """These and what was seen elsewhere at the same time; ages count from now on both sides."""
        tokens = self.tokens + other.tokens
        moved = [np.where(one.last_use >= 0, one.last_use + tokens - one.tokens, -1) for one in (self, other)]
        # The other's conversations count as the older ones.
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
        """An uncompressed .npz, whose checksums tell damage."""
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
            OSError: it cannot be read.
            RequestError: as `from_bytes`; the message names the file.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except RequestError as error:
            raise RequestError(f"{path}: {error.what}") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> RoutingCounts:
        """Read what `to_bytes` wrote.

        Raises:
            RequestError: damaged, of another format, or not of this kind; the message names no file.
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
        """Raise `RequestError` unless shapes, types and values can be true."""
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
    """What was seen since the file was last read or written.

    A use by token t weighs 2^(t / half-life - scaled), so that older uses need not be touched.
    """

    def __init__(self, layers: int, n_experts: int, top_k: int) -> None:
        self.tokens = 0
        self.uses = np.zeros((layers, n_experts))
        self.pairs: Floats = np.zeros((max(0, layers - 1), n_experts, n_experts), np.float32)
        self.last_use: Longs = np.full((layers, n_experts), -1, np.int64)
        self.recall: Longs = np.zeros((2, 2), np.int64)
        self._recent: list[Shorts] = []
        self._recent_tokens = 0
        self._top_k = top_k
        self._first_key = (np.arange(layers, dtype=np.int32) * n_experts)[:, None]
        self._first_pair = (np.arange(max(0, layers - 1)) * n_experts**2)[:, None, None]
        self._scaled = 0.0

    @property
    def unit(self) -> float:
        """Weight of a use now."""
        return float(2.0 ** (self.tokens / HALF_LIFE_TOKENS - self._scaled))

    @property
    def discount(self) -> float:
        """What a use before these tokens still counts."""
        return float(0.5 ** (self.tokens / HALF_LIFE_TOKENS))

    def counts(self) -> RoutingCounts:
        """The same with uses weighed as of now."""
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
        """See `RouterStatistics.add`."""
        paired_every = -(-len(ids) // PAIRED_TOKENS) if prefill else 1
        for start in range(0, len(ids), PART_TOKENS):
            self._add_part(ids[start : start + PART_TOKENS], paired_every)
        if not prefill:
            self._remember(ids)

    def _add_part(self, ids: Int32s, paired_every: int) -> None:
        self._rescale()
        unit = self.unit
        keys = ids + self._first_key
        self.uses += unit * np.bincount(keys.ravel(), minlength=self.uses.size).reshape(self.uses.shape)
        # Of repeated keys the last value stays: the latest token's.
        numbers = np.arange(self.tokens, self.tokens + len(ids))
        self.last_use.reshape(-1)[keys.ravel()] = np.repeat(numbers, keys[0].size)
        paired = ids[::paired_every].astype(np.int64)
        pairs = paired[:, :-1, :, None] * self.uses.shape[1] + paired[:, 1:, None, :] + self._first_pair
        np.add.at(self.pairs.reshape(-1), pairs.ravel(), np.float32(unit))
        self.tokens += len(ids)

    def _rescale(self) -> None:
        excess = self.tokens / HALF_LIFE_TOKENS - self._scaled
        if excess > RESCALE_AT:
            self.uses *= 0.5**excess
            self.pairs *= np.float32(0.5**excess)
            self._scaled += excess

    def _remember(self, ids: Int32s) -> None:
        self._recent.append(ids[-RECENT_TOKENS:].astype(np.int16))
        self._recent_tokens += len(ids)
        if self._recent_tokens > 2 * RECENT_TOKENS:
            self._recent = [np.concatenate(self._recent)[-RECENT_TOKENS:]]
            self._recent_tokens = RECENT_TOKENS
