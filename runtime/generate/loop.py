"""The generation loop: prefill the prompt, then sample and decode until the answer ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import TYPE_CHECKING, Protocol

from moebox.cost.usage import Usage
from moebox.errors import MoeboxError, RequestError
from moebox.runtime.generate.sampling import Sampler
from moebox.runtime.text.pieces import FinishReason, Stats

if TYPE_CHECKING:
    from torch import Tensor

OnPrefill = Callable[[int, int], None]
"""Called with (prompt tokens computed, prompt tokens to compute)."""

OnTokens = Callable[[int], None]
"""Called with the number of tokens computed since the last call."""


class ContextError(RequestError):
    """The prompt has more tokens than the context holds."""


class TokenSession(Protocol):
    """The part of `engine.Session` that the loop needs."""

    context: int
    reused: int

    def prefill(
        self, token_ids: list[int], *, on_progress: OnPrefill | None, cancel: Event | None
    ) -> Tensor: ...

    def decode(self, token: int) -> Tensor: ...


class Generation:
    """One answer. Iterating over it yields its token ids, without the token that ends it.

    Attributes:
        tokens: ids so far.
        computed: tokens of the prompt that were computed so far.
        finish_reason: why the answer ended.
        on_tokens: called after each chunk of the prompt and each decoded token; to be set before iterating.

    Args:
        session: has the cache; the prefix that the prompt shares with the cache is not computed again.
        prompt: ids of the whole conversation so far.
        sampler: chooses each token, and has `max_tokens`.
        stop_ids: tokens that end the answer.
        cancel: an event that ends the answer after the current step.
        on_prefill: called with the progress of the prompt.
    """

    def __init__(
        self,
        session: TokenSession,
        prompt: list[int],
        sampler: Sampler,
        stop_ids: frozenset[int],
        *,
        cancel: Event | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.computed = 0
        self.on_tokens: OnTokens = lambda _: None
        self.finish_reason: FinishReason = "cancelled"
        self._session = session
        self._prompt = prompt
        self._sampler = sampler
        self._stop_ids = stop_ids
        self._cancel = cancel or Event()
        self._on_prefill = on_prefill
        self._prefill_s = self._ttft_s = self._decode_s = 0.0
        self._decoded = 0
        self._reused = 0

    def __iter__(self) -> Iterator[int]:
        try:
            token = self._first()
        except MoeboxError:
            if self._cancel.is_set():  # the error is the session's Cancelled
                return
            raise
        while token not in self._stop_ids:
            self.tokens.append(token)
            yield token
            reason = self._limit()
            if reason is not None:
                self.finish_reason = reason
                return
            token = self._next(token)
        self.finish_reason = "stop"

    def _first(self) -> int:
        begin = time.perf_counter()
        try:
            logits = self._session.prefill(self._prompt, on_progress=self._progress, cancel=self._cancel)
        finally:
            self._prefill_s = time.perf_counter() - begin
            self._reused = self._session.reused
        token = self._sampler.sample(logits)
        self._ttft_s = time.perf_counter() - begin
        return token

    def _progress(self, done: int, total: int) -> None:
        self.on_tokens(done - self.computed)
        self.computed = done
        if self._on_prefill is not None:
            self._on_prefill(done, total)

    def _next(self, token: int) -> int:
        begin = time.perf_counter()
        try:
            token = self._sampler.sample(self._session.decode(token))
        finally:
            self._decode_s += time.perf_counter() - begin
        self._decoded += 1
        self.on_tokens(1)
        return token

    def _limit(self) -> FinishReason | None:
        """Why the answer ends here; None where it goes on."""
        if self._cancel.is_set():
            return "cancelled"
        if len(self.tokens) == self._sampler.options.max_tokens:
            return "length"
        return "context" if len(self._prompt) + len(self.tokens) > self._session.context else None

    @property
    def stats(self) -> Stats:
        """Counts and times so far."""
        usage = Usage(
            prompt_tokens=self._reused + self.computed,
            cached_tokens=self._reused,
            completion_tokens=len(self.tokens),
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
        )
        return Stats(
            usage,
            prompt_tokens=len(self._prompt),
            decoded_tokens=self._decoded,
            ttft_s=self._ttft_s,
            finish_reason=self.finish_reason,
            seed=self._sampler.seed,
            context_used=min(len(self._prompt) + len(self.tokens), self._session.context),
            context=self._session.context,
        )
