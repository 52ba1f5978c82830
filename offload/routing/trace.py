"""Routing traces: which experts each token picked, recorded or made up; `replay.py` tries caches on them.

Shapes: T tokens, L MoE layers, E n_routed_experts, k num_experts_per_tok. `layer` counts MoE layers from 0.

The synthetic generator reproduces the locality that others publish for large mixtures of experts: 41-45 % of
a token's picks repeat at the next token, and an LRU cache over the experts of all layers hits about 40, 57,
74 and 86 % with 5.5, 11, 22 and 44 % of them resident. These figures come from different models, and together
they say something about time that each alone does not: two to three tokens of K2 fill 5.5 %, so that an
expert which skips a token must seldom return at once, and often within the ten tokens after. So it is here.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.errors import RequestError

Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

TRACE_FORMAT = 1

REPEAT_SHARE = 0.42
"""Picks of a token that repeat at the next one."""
LRU_CURVE = ((0.055, 0.425), (0.11, 0.6), (0.22, 0.75), (0.44, 0.865))
"""(share of all experts resident, share of picks within its reach); a replay hits slightly less."""
REPEAT_SPREAD = 30.0
"""Concentration of the Beta distribution of a token's share of repeats: tokens differ, the mean holds."""
POPULARITY_SIGMA = 1.5
"""Experts differ in use by a lognormal factor of this width: with it the decayed score beats LRU by as much
as on tiny-k2's own routing of English text (0.05 where the picks of 4.3 tokens fit), as K2's 9 % do."""
POPULARITY_TOKENS = 250
"""Tokens after which an expert's popularity has forgotten all but 1/e of what it was."""
DRIFT_EVERY = 10
BOUND_SHIFT = 0.5
"""Tokens: what an LRU cache reaches back to varies from token to token, so a class starts a little later."""

NPZ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""What numpy and zipfile raise for files that are none of their own, cut off, damaged, or lack a field."""


@dataclass(frozen=True)
class RoutingTrace:
    """What a router picked.

    Attributes:
        ids: int32 [T, L, k], the k different experts of each token and MoE layer.
        n_experts: E.
        source: where it comes from: a model's name, or how it was made.

    Raises:
        RequestError: another shape or dtype, an id outside 0..E-1, or an expert twice in one pick.
    """

    ids: Int32s
    n_experts: int
    source: str = ""

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.dtype != np.int32 or 0 in self.ids.shape:
            raise RequestError(
                f"routing trace: {self.ids.dtype} {list(self.ids.shape)}, "
                "must be int32 [tokens, layers, top_k]"
            )
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= self.n_experts:
            raise RequestError(
                f"routing trace: expert {low if low < 0 else high}, must be within 0..{self.n_experts - 1}"
            )
        ordered = np.sort(self.ids, axis=-1)
        twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
        if twice.size:
            token, layer = twice[0, :2]
            raise RequestError(f"routing trace: token {token}, layer {layer}: an expert is picked twice")

    @property
    def tokens(self) -> int:
        """T."""
        return int(self.ids.shape[0])

    @property
    def layers(self) -> int:
        """L."""
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        """k."""
        return int(self.ids.shape[2])

    def repeat_share(self) -> float:
        """Share of a token's picks that the token before had picked, mean over tokens and layers."""
        return float((self.ids[1:, :, :, None] == self.ids[:-1, :, None, :]).any(-1).mean())

    def keys(self) -> Int32s:
        """int32 [T, L, k]: `layer * E + expert`, one number per expert of the model."""
        return self.ids + (np.arange(self.layers, dtype=np.int32) * self.n_experts)[:, None]

    def check(self, layers: int, n_experts: int, top_k: int, tokens: int) -> None:
        """Raise `RequestError` unless the trace is of this shape and has at least so many tokens."""
        held, wanted = (self.layers, self.n_experts, self.top_k), (layers, n_experts, top_k)
        if held != wanted:
            raise RequestError(
                f"routing trace: {held[0]} MoE layers, {held[1]} experts, top {held[2]}; "
                f"the model has {wanted[0]}, {wanted[1]}, top {wanted[2]}",
                "Record the trace with this model, or use --routing synthetic.",
            )
        if self.tokens < tokens:
            raise RequestError(
                f"routing trace: {self.tokens} tokens, the benchmark needs {tokens}",
                "Ask for fewer prompt or decode tokens, or record a longer trace.",
            )

    def save(self, path: Path) -> None:
        """Write an uncompressed .npz: `format` (1), `ids` int16 or int32 [T, L, k], `n_experts`, `source`."""
        small = self.n_experts <= np.iinfo(np.int16).max
        with path.open("wb") as file:  # np.savez would append .npz to another name
            np.savez(
                file,
                format=TRACE_FORMAT,
                ids=self.ids.astype(np.int16 if small else np.int32),
                n_experts=self.n_experts,
                source=self.source,
            )

    @classmethod
    def load(cls, path: Path) -> RoutingTrace:
        """Read what `save` wrote.

        Raises:
            RequestError: no such file, not a trace, or contents that are none; the message names the file.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                version, ids = int(data["format"]), data["ids"]
                n_experts, source = int(data["n_experts"]), str(data["source"])
        except FileNotFoundError:
            raise RequestError(f"{path}: no such file") from None
        except NPZ_ERRORS as error:
            raise RequestError(
                f"{path}: not a routing trace: {error}",
                "A trace is an .npz file that RoutingTrace.save wrote.",
            ) from None
        if version != TRACE_FORMAT:
            raise RequestError(f"{path}: format {version}; this version of moebox reads {TRACE_FORMAT}")
        try:
            return cls(ids.astype(np.int32) if ids.dtype == np.int16 else ids, n_experts, source)
        except RequestError as error:
            raise RequestError(f"{path}: {error.what}", error.fix) from None


def synthetic_trace(tokens: int, layers: int, n_experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """A trace with the published locality, as far as the shape allows; the same seed gives the same trace.

    Each token keeps a share of the last token's picks. The others are drawn by age: the curve of LRU hits
    says how much of the picks falls between two cache sizes, and so between two ages. Which picks are kept,
    and which expert of an age class returns, depends on popularity, which differs between experts and
    drifts. Shapes whose top k alone fills a cache of the curve (tiny ones) leave that part of it out.
    """
    draw = _Draw(np.random.default_rng(seed), layers, n_experts, top_k)
    ids = np.stack([draw.token(index) for index in range(tokens)])
    return RoutingTrace(ids, n_experts, f"synthetic, seed {seed}")


class _Draw:
    """State of the generator: when each expert was last picked, and how popular it is."""

    def __init__(self, rng: np.random.Generator, layers: int, n_experts: int, top_k: int) -> None:
        self.rng, self.top_k = rng, top_k
        self.shape = (layers, n_experts)
        bounds, masses = age_classes(n_experts, top_k)
        ages = np.arange(int(bounds[-1]) + 2 if bounds else 2)
        self.class_of_age = np.searchsorted(np.array(bounds), ages, side="left").astype(np.int64)
        self.masses = np.array(masses, np.float32)
        self.log_popularity = self._normals()
        self.popularity = np.exp(POPULARITY_SIGMA * self.log_popularity)
        # At the start the experts have ages as if the trace had run for ever: a random order, spread evenly.
        order = rng.permuted(np.tile(np.arange(n_experts), (layers, 1)), axis=1)
        self.last = -(order * ages[-1] // n_experts) - 2
        self.picks = np.argsort(order, axis=1)[:, :top_k]
        np.put_along_axis(self.last, self.picks, -1, axis=1)

    def token(self, index: int) -> Int32s:
        """The picks [L, k] of token `index`."""
        if index % DRIFT_EVERY == 0:
            self._drift()
        race = self.rng.standard_exponential(self.shape, dtype=np.float32) / self._weights(index)
        first_or_never = np.where(self._kept(), np.float32(-1), np.float32(np.inf))
        np.put_along_axis(race, self.picks, first_or_never, axis=1)
        self.picks = np.argpartition(race, self.top_k - 1, axis=1)[:, : self.top_k]
        np.put_along_axis(self.last, self.picks, index, axis=1)
        return self.picks.astype(np.int32)

    def _kept(self) -> npt.NDArray[np.bool_]:
        """[L, k]: which of the last token's picks repeat; the popular ones rather than others."""
        share = self.rng.beta(REPEAT_SHARE * REPEAT_SPREAD, (1 - REPEAT_SHARE) * REPEAT_SPREAD)
        count = self.rng.binomial(self.top_k, share, size=(self.shape[0], 1))
        race = self.rng.standard_exponential(self.picks.shape, dtype=np.float32)
        race /= np.take_along_axis(self.popularity, self.picks, axis=1)
        return race.argsort(axis=1).argsort(axis=1) < count

    def _weights(self, index: int) -> Floats:
        """[L, E]: chances of those that the last token did not pick; each age class has its mass in all."""
        layers, _ = self.shape
        n_classes = len(self.masses)
        ages = np.minimum(index - self.last, len(self.class_of_age) - 1)
        cells = self.class_of_age[ages] + np.arange(layers)[:, None] * n_classes
        sums = np.bincount(cells.ravel(), self.popularity.ravel(), layers * n_classes).reshape(
            layers, n_classes
        )
        factors = self.masses / np.maximum(sums, 1e-9).astype(np.float32)
        weights: Floats = self.popularity * factors.ravel()[cells]
        return weights

    def _drift(self) -> None:
        keep = np.float32(np.exp(-DRIFT_EVERY / POPULARITY_TOKENS))
        self.log_popularity = keep * self.log_popularity + np.sqrt(1 - keep**2) * self._normals()
        self.popularity = np.exp(POPULARITY_SIGMA * self.log_popularity)

    def _normals(self) -> Floats:
        return self.rng.standard_normal(self.shape, dtype=np.float32)


def age_classes(n_experts: int, top_k: int) -> tuple[list[float], list[float]]:
    """The curve of LRU hits as classes of age.

    An LRU cache holds what was used within some number of tokens. Each further token back adds
    k * (1 - hits) experts, which gives the age up to which a cache of each size reaches; what the curve gains
    between two sizes is the mass of the picks of those ages.

    Returns:
        Upper bounds of the ages, in tokens, n of them; masses of the n + 1 classes, the last without bound.
    """
    knots = [(size * n_experts, hits) for size, hits in LRU_CURVE if size * n_experts > 1.5 * top_k]
    sizes, hits = zip((float(top_k), REPEAT_SHARE), *knots, (float(n_experts), 1.0), strict=True)
    bounds: list[float] = []
    held, age = float(top_k), 1
    while len(bounds) < len(knots):
        gained = top_k * (1 - float(np.interp(held, sizes, hits)))
        while len(bounds) < len(knots) and held + gained >= sizes[len(bounds) + 1]:
            bounds.append(age + (sizes[len(bounds) + 1] - held) / gained + BOUND_SHIFT)
        held, age = held + gained, age + 1
    return bounds, [upper - lower for lower, upper in pairwise(hits)]


class TraceRouting:
    """Hands a trace to the experts instead of the router's picks: prompts first, then token by token.

    A chunk of T tokens goes through all layers before the next chunk starts, which is how the position is
    known; a trace that is used up starts again.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.position = 0
        self.last = torch.empty(0, trace.top_k, dtype=torch.int64)
        """What `prefill` returned last."""
        self._chunk = 0
        self._layer = -1

    def prefill(self, layer: int, tokens: int) -> Tensor:
        """Picks int64 [T, k] of MoE layer `layer` for the next `tokens` tokens."""
        if layer <= self._layer:
            self._next_chunk()
        self._layer, self._chunk = layer, tokens
        self.last = torch.from_numpy(self._take(tokens)[:, layer].astype(np.int64))
        return self.last

    def decode(self) -> Tensor:
        """Picks int32 [L, k] of the next token."""
        self._next_chunk()
        picks = self._take(1)[0]
        self.position += 1
        return torch.from_numpy(picks)

    def rewind(self, position: int = 0) -> None:
        """Go on at the token of this number."""
        self.position, self._chunk, self._layer = position, 0, -1

    def _next_chunk(self) -> None:
        self.position += self._chunk
        self._chunk, self._layer = 0, -1

    def _take(self, tokens: int) -> Int32s:
        rows = np.arange(self.position, self.position + tokens) % self.trace.tokens
        return self.trace.ids[rows]
