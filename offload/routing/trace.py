"""Routing traces: which experts each token picked, recorded or synthetic. `replay.py` replays them.

Shapes: T tokens, L MoE layers, E n_routed_experts, k num_experts_per_tok. `layer` counts MoE layers from 0.

The synthetic generator reproduces the locality that others publish for large mixtures of experts: 41-45 % of
a token's picks repeat at the next token, and an LRU cache over the experts of all layers hits about 40, 57,
74 and 86 % with 5.5, 11, 22 and 44 % of them resident. These figures come from different models. Together
they imply how soon an expert returns: two to three tokens of K2 fill a cache of 5.5 %, so that an expert
which is not picked again at once is seldom picked at the token after, and often within the ten tokens after
that.
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
"""Share of a token's picks that the next token repeats."""
LRU_CURVE = ((0.055, 0.425), (0.11, 0.6), (0.22, 0.75), (0.44, 0.865))
"""(share of all experts that an LRU cache holds, share of picks that hit it); a replay hits slightly less."""
REPEAT_SPREAD = 30.0
"""Concentration of the Beta distribution of a token's share of repeats; the mean is `REPEAT_SHARE`."""
POPULARITY_SIGMA = 1.5
"""Sigma of the lognormal factor by which experts differ in use. With it the decayed score's hit rate is as
much above LRU's as on tiny-k2's routing of English text: by 0.05 in a cache for the picks of 4.3 tokens,
which is 9 % of K2's experts."""
POPULARITY_TOKENS = 250
"""Tokens after which the correlation of an expert's log popularity with its present value is 1/e."""
DRIFT_EVERY_TOKENS = 10
BOUND_SHIFT_TOKENS = 0.5
"""Added to the bounds of age classes, because the age up to which an LRU cache holds experts varies."""

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
"""Errors of numpy and zipfile for a file of another format, a cut or damaged one, or one without a field."""


@dataclass(frozen=True)
class RoutingTrace:
    """The picks of a router.

    Attributes:
        ids: int32 [T, L, k], the k different experts of each token and MoE layer.
        n_experts: E.
        source: the name of the model, or how the trace was made.

    Raises:
        RequestError: another shape or dtype, an id outside 0..E-1, or an expert that a token picks twice in a
            layer.
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
        """T, the number of tokens."""
        return int(self.ids.shape[0])

    @property
    def layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        """k, the number of experts that a token picks in a layer."""
        return int(self.ids.shape[2])

    def repeat_share(self) -> float:
        """Share of a token's picks that the token before has picked, too: mean over tokens and layers."""
        return float((self.ids[1:, :, :, None] == self.ids[:-1, :, None, :]).any(-1).mean())

    def keys(self) -> Int32s:
        """Expert keys, `layer * E + expert`: int32 [T, L, k]."""
        return self.ids + (np.arange(self.layers, dtype=np.int32) * self.n_experts)[:, None]

    def check(self, layers: int, n_experts: int, top_k: int, tokens: int) -> None:
        """Raise `RequestError` unless the trace has this shape and at least `tokens` tokens."""
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
            RequestError: no such file, not a trace, or impossible contents; the message names the file.
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
    """Make a trace with the published locality. The same seed gives the same trace.

    Each token repeats a share of the last token's picks. The other picks are drawn by age, the number of
    tokens since an expert's last pick: the curve of LRU hits gives the share of picks between two cache
    sizes, and so between two ages. Popularity, which differs between experts and drifts, decides which picks
    are repeated and which expert of an age class is picked. Where k experts alone fill a cache size of the
    curve, as in tiny shapes, that point of the curve is left out.
    """
    draw = _Draw(np.random.default_rng(seed), layers, n_experts, top_k)
    ids = np.stack([draw.token(index) for index in range(tokens)])
    return RoutingTrace(ids, n_experts, f"synthetic, seed {seed}")


class _Draw:
    """State of the generator: the last pick of each expert, and its popularity."""

    def __init__(self, rng: np.random.Generator, layers: int, n_experts: int, top_k: int) -> None:
        self.rng, self.top_k = rng, top_k
        self.shape = (layers, n_experts)
        bounds, masses = age_classes(n_experts, top_k)
        ages = np.arange(int(bounds[-1]) + 2 if bounds else 2)
        self.class_of_age = np.searchsorted(np.array(bounds), ages, side="left").astype(np.int64)
        self.masses = np.array(masses, np.float32)
        self.log_popularity = self._normals()
        self.popularity = np.exp(POPULARITY_SIGMA * self.log_popularity)
        # At the start experts have random ages, spread evenly, as in the middle of a long trace.
        order = rng.permuted(np.tile(np.arange(n_experts), (layers, 1)), axis=1)
        self.last = -(order * ages[-1] // n_experts) - 2
        self.picks = np.argsort(order, axis=1)[:, :top_k]
        np.put_along_axis(self.last, self.picks, -1, axis=1)

    def token(self, index: int) -> Int32s:
        """The picks [L, k] of token `index`."""
        if index % DRIFT_EVERY_TOKENS == 0:
            self._drift()
        race = self.rng.standard_exponential(self.shape, dtype=np.float32) / self._weights(index)
        first_or_never = np.where(self._kept(), np.float32(-1), np.float32(np.inf))
        np.put_along_axis(race, self.picks, first_or_never, axis=1)
        self.picks = np.argpartition(race, self.top_k - 1, axis=1)[:, : self.top_k]
        np.put_along_axis(self.last, self.picks, index, axis=1)
        return self.picks.astype(np.int32)

    def _kept(self) -> npt.NDArray[np.bool_]:
        """[L, k]: which of the last token's picks are repeated; popular experts are more likely to be."""
        share = self.rng.beta(REPEAT_SHARE * REPEAT_SPREAD, (1 - REPEAT_SHARE) * REPEAT_SPREAD)
        count = self.rng.binomial(self.top_k, share, size=(self.shape[0], 1))
        race = self.rng.standard_exponential(self.picks.shape, dtype=np.float32)
        race /= np.take_along_axis(self.popularity, self.picks, axis=1)
        return race.argsort(axis=1).argsort(axis=1) < count

    def _weights(self, index: int) -> Floats:
        """Unnormalised probabilities, [L, E], of experts that the last token did not pick.

        Those of an age class sum to the mass of the class, and are proportional to popularity.
        """
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
        keep = np.float32(np.exp(-DRIFT_EVERY_TOKENS / POPULARITY_TOKENS))
        self.log_popularity = keep * self.log_popularity + np.sqrt(1 - keep**2) * self._normals()
        self.popularity = np.exp(POPULARITY_SIGMA * self.log_popularity)

    def _normals(self) -> Floats:
        return self.rng.standard_normal(self.shape, dtype=np.float32)


def age_classes(n_experts: int, top_k: int) -> tuple[list[float], list[float]]:
    """The curve of LRU hits as classes of age.

    An LRU cache holds the experts that were picked within some number of tokens, its reach. One more token of
    reach adds k * (1 - hits) experts, which gives the reach of each cache size. The mass of the ages between
    two reaches is the difference of their hits.

    Returns:
        n upper bounds of ages, in tokens; the masses of the n + 1 classes, the last of which has no bound.
    """
    knots = [(size * n_experts, hits) for size, hits in LRU_CURVE if size * n_experts > 1.5 * top_k]
    sizes, hits = zip((float(top_k), REPEAT_SHARE), *knots, (float(n_experts), 1.0), strict=True)
    bounds: list[float] = []
    held, age = float(top_k), 1
    while len(bounds) < len(knots):
        gained = top_k * (1 - float(np.interp(held, sizes, hits)))
        while len(bounds) < len(knots) and held + gained >= sizes[len(bounds) + 1]:
            bounds.append(age + (sizes[len(bounds) + 1] - held) / gained + BOUND_SHIFT_TOKENS)
        held, age = held + gained, age + 1
    return bounds, [upper - lower for lower, upper in pairwise(hits)]


class TraceRouting:
    """Replaces a router's picks by those of a trace, first for prompts, then for one token after another.

    All layers of a chunk ask before the next chunk's first layer does, so that a layer with a lower number
    begins a new chunk. After its last token the trace starts again.

    Attributes:
        trace: the picks.
        position: the number of the next token.
        last: what `prefill` returned last.
    """

    def __init__(self, trace: RoutingTrace) -> None:
        self.trace = trace
        self.position = 0
        self.last = torch.empty(0, trace.top_k, dtype=torch.int64)
        self._chunk = 0
        self._layer = -1

    def prefill(self, layer: int, tokens: int) -> Tensor:
        """Picks int64 [T, k] of MoE layer `layer` for the next T = `tokens` tokens."""
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
        """Continue at the token of this number."""
        self.position, self._chunk, self._layer = position, 0, -1

    def _next_chunk(self) -> None:
        self.position += self._chunk
        self._chunk, self._layer = 0, -1

    def _take(self, tokens: int) -> Int32s:
        rows = np.arange(self.position, self.position + tokens) % self.trace.tokens
        return self.trace.ids[rows]
