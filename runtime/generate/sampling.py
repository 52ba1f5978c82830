"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, seed."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.config import read_json
from moebox.errors import MoeboxError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**63 - 1
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens. A checkpoint's `generation_config.json` overrides the defaults.

    Attributes:
        max_tokens: the most tokens of an answer; None: until the context is full.
        temperature: 0 always takes the most probable token. Moonshot recommends 0.6 for Kimi-K2-Instruct.
        top_p, top_k, min_p, repetition_penalty: filters; 1, 0, 0 and 1 switch each of them off.
        seed: of the random numbers; None: a fresh one for each answer, reported with the answer.
        stop: strings that end an answer.

    Raises:
        RequestError: a value of another type or out of range; names the option and the value.
    """

    max_tokens: int | None = None
    temperature: float = 0.6
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop = {self.stop!r}", "Give non-empty strings.")

    def with_(self, **changes: Any) -> SamplingOptions:
        """A copy with `changes`.

        Raises:
            RequestError: an unknown option, or a value out of range.
        """
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise RequestError(f"unknown sampling option {name!r}", f"Known: {', '.join(known)}.")
        return replace(self, **changes)


def _check_int(name: str, value: object, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} = {value!r} is not a whole number")
    if value < least or (most is not None and value > most):
        limits = f"at least {least}" if most is None else f"{least} to {most}"
        raise RequestError(f"{name} = {value} is out of range", f"It must be {limits}.")


def _check_float(name: str, value: object, least: float, most: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} = {value!r} is not a number")
    if not least <= value <= most or (above and value == least):
        limits = f"above {least:g}, at most {most:g}" if above else f"{least:g} to {most:g}"
        raise RequestError(f"{name} = {value} is out of range", f"It must be {limits}.")


def generation_defaults(folder: Path) -> tuple[SamplingOptions, tuple[int, ...]]:
    """Sampling options and end-of-text ids of the folder's `generation_config.json`, where it has any.

    Raises:
        ConfigError: the file is no JSON object.
        RequestError: a value out of range; names the file.
    """
    path = folder / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    eos = config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    try:
        for token in eos_ids:
            _check_int("eos_token_id", token, 0, None)
        return SamplingOptions().with_(**given), tuple(eos_ids)
    except RequestError as error:
        raise RequestError(f"{path}: {error.what}", error.fix) from None


class Sampler:
    """Draws the tokens of one answer. The same options, seed and logits give the same tokens.

    Args:
        options: how to choose tokens.
        prompt: the prompt's ids; the repetition penalty (arXiv 1909.05858, as transformers applies it)
            applies to them and to the answer's.
    """

    def __init__(self, options: SamplingOptions, prompt: Iterable[int] = ()) -> None:
        import torch

        self.options = options
        self.seed = secrets.randbelow(MAX_SEED) if options.seed is None else options.seed
        self._generator = torch.Generator(device="cpu").manual_seed(self.seed)
        self._seen = set(prompt) if options.repetition_penalty != 1.0 else set()

    def sample(self, logits: Tensor) -> int:
        """Draw the next token.

        Args:
            logits: float [vocab].

        Raises:
            MoeboxError: the largest logit is NaN or infinite.
        """
        options = self.options
        logits = logits.detach().float().cpu()
        if not bool(logits.max().isfinite()):
            raise MoeboxError(
                "the model returned logits that are not finite",
                "Its weights may be damaged: `moebox inspect MODEL --verify` re-hashes them.",
            )
        if options.repetition_penalty != 1.0:
            logits = self._penalised(logits)
        token = int(logits.argmax()) if options.temperature == 0 else self._draw(logits)
        if options.repetition_penalty != 1.0:
            self._seen.add(token)
        return token

    def _penalised(self, logits: Tensor) -> Tensor:
        import torch

        seen = torch.tensor(sorted(self._seen), dtype=torch.long)
        scores = logits[seen]
        penalty = self.options.repetition_penalty
        return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))

    def _draw(self, logits: Tensor) -> int:
        """Inversion: the first token whose cumulative weight exceeds `uniform * total`."""
        import torch

        uniform = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        weights, tokens, total = candidates(logits, self.options, uniform)
        index = int(torch.searchsorted(weights.cumsum(0), uniform * total, right=True))
        return int(tokens[min(index, len(tokens) - 1)])


def candidates(logits: Tensor, options: SamplingOptions, share: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """Tokens that may be drawn, most probable first.

    The filters apply in the order temperature, top-k, top-p, min-p, as in transformers. Of tokens with equal
    probability the token with the smaller id comes first.

    Args:
        logits: [vocab], float32 or float64.
        options: temperature above 0, and the filters.
        share: without a filter, the share of all probability that the result covers at least.

    Returns:
        Weights (float64 [n], where the most probable token has 1), token ids (int64 [n]), and the total
        weight: of the n tokens where a filter is on, of the whole vocabulary where none is.
    """
    relative = (logits - logits.max()) / options.temperature
    whole = float(relative.exp().sum().double())
    weights, tokens = _leading(relative, options, whole, share)
    if options.top_k:
        whole = float(weights.sum())
    if options.top_p < 1:
        # A token stays while the weight before it is below top_p of the whole; the first token always stays.
        before = weights.cumsum(0) - weights
        keep = max(int((before < options.top_p * whole).sum()), 1)
        weights, tokens = weights[:keep], tokens[:keep]
    if options.min_p > 0:
        keep = int((weights >= options.min_p).sum())
        weights, tokens = weights[:keep], tokens[:keep]
    filtered = bool(options.top_k) or options.top_p < 1 or options.min_p > 0
    return weights, tokens, float(weights.sum()) if filtered else whole


def _leading(relative: Tensor, options: SamplingOptions, whole: float, share: float) -> tuple[Tensor, Tensor]:
    """The most probable tokens, best first: all that the filters or the draw can reach.

    Sorting a vocabulary of 163,840 takes more than 10 ms. The first 256 tokens are nearly always enough, and
    where they are not, eight times as many are tried.
    """
    size = min(options.top_k or _FIRST_CANDIDATES, len(relative))
    while True:
        values, tokens = relative.topk(size)
        weights = values.double().exp()
        covered = float(weights.sum())
        enough = bool(options.top_k) or covered >= min(share, options.top_p) * whole
        if options.min_p > 0:
            enough |= float(weights[-1]) < options.min_p
        if enough or size == len(relative):
            break
        size = min(size * 8, len(relative))
    order = tokens.argsort()
    weights, tokens = weights[order], tokens[order]
    order = weights.argsort(descending=True, stable=True)
    return weights[order], tokens[order]
