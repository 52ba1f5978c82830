"""A loaded model, and conversations with it: `Engine` holds the weights, `Session` a cache of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import MoeboxError, PlanError, RequestError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.traffic import Traffic
from moebox.runtime.engine.base import Runner
from moebox.runtime.engine.cpu_plan import CpuPlan
from moebox.runtime.engine.cpu_runner import load_on_cpu
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.model import precision
from moebox.runtime.model.kv_cache import bytes_per_token
from moebox.runtime.model.loader import check_names, check_quantized, stored_bytes

if TYPE_CHECKING:
    from moebox.runtime.engine.gpu_plan import GpuPlan

Cancel = Event | Callable[[], bool]
"""An event that is set, or a function that returns True, when a prefill should stop."""


class Cancelled(MoeboxError):
    """A prefill was cancelled; the session keeps the chunks that were finished."""


class Engine:
    """A model of the family, ready to compute.

    Attributes:
        config: the checkpoint's configuration.
        folder: the checkpoint.
        experts_bytes: INT4 bytes of all routed experts.
        backbone_bytes: bytes of all other parameters, as loaded.
        backbone_saved_bytes: what int8 or nf4 saves of the backbone, against bf16.
        kv_bytes_per_token: bytes of cache that a token of context takes.
        context: tokens that a session may hold unless it asks for less.
        dtype: the dtype in which the backbone computes.
        runner: runs the passes.
        plan: how loading has shared memory out.
    """

    def __init__(self, checkpoint: Checkpoint, runner: Runner, plan: CpuPlan | GpuPlan) -> None:
        self.folder = checkpoint.folder
        self.config: ModelConfig = checkpoint.config
        self.runner = runner
        self.plan = plan
        self.dtype = runner.dtype
        self.context = plan.context
        self.experts_bytes = self.config.experts_bytes
        self.backbone_bytes = stored_bytes(runner.model)
        self.backbone_saved_bytes = plan.unquantized_backbone_bytes - self.backbone_bytes
        self.kv_bytes_per_token = bytes_per_token(self.config, self.dtype)

    @classmethod
    def load(cls, path: Path, options: LoadOptions | None = None) -> Engine:
        """Load a quantized checkpoint: a folder that `moebox quantize` wrote, or a native INT4 checkpoint.

        Raises:
            ConfigError: `config.json` is missing or of another family.
            CheckpointError: not quantized, damaged, or tensors do not match the config.
            PlanError: it does not fit the memory, or asks for what the device does not have.
        """
        options = options or LoadOptions()
        precision.check_precision(options.backbone)
        if options.threads is not None and options.threads < 1:
            raise PlanError(f"threads = {options.threads}, at least 1 is needed")
        name = options.device or _default_device()
        checkpoint = Checkpoint.open(Path(path), stores=options.stores)
        check_quantized(checkpoint)
        check_names(checkpoint)
        load_runner = load_on_cpu if name == "cpu" else partial(_load_on_gpu, name)
        runner, plan = load_runner(checkpoint, options)
        return cls(checkpoint, runner, plan)

    @property
    def device(self) -> torch.device:
        """The device that computes the backbone."""
        return self.runner.model.processor.device

    def traffic(self) -> Traffic:
        """Counts of where experts were found and of bytes moved, since loading began."""
        return self.runner.traffic()

    def close(self) -> None:
        """End reads, and save what was learned of the routing; the model computes nothing afterwards."""
        self.runner.close()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """Logits of `token_ids` [T] in one forward pass that keeps no cache: fp32 [T, vocab_size].

        Raises:
            RequestError: no tokens, an id outside the vocabulary, or more than `context` tokens.
        """
        self._check_tokens(token_ids, self.context)
        cache = self.runner.new_cache(len(token_ids))
        chunks = _chunks(token_ids, self.runner.chunk_tokens)
        return torch.cat([self.runner.forward(chunk, cache) for chunk in chunks])

    def session(self, context: int | None = None) -> Session:
        """A conversation with a cache of its own, for up to `context` tokens.

        Raises:
            RequestError: more than `max_position_embeddings`, or than memory allows.
        """
        if context is not None and not 1 <= context <= self.context:
            raise RequestError(
                f"context of {context} tokens; this model and memory allow 1 to {self.context}"
            )
        return Session(self, context or self.context)

    def _check_tokens(self, token_ids: list[int], context: int) -> None:
        if not token_ids:
            raise RequestError("no tokens to compute")
        if len(token_ids) > context:
            raise RequestError(
                f"{len(token_ids)} tokens do not fit the context of {context}",
                "Shorten the conversation, or load the model with a larger context.",
            )
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.config.vocab_size:
            raise RequestError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            )


class Session:
    """One conversation. Its cache lasts from turn to turn, so that only new tokens are computed.

    Attributes:
        context: tokens that the cache may hold.
        reused: tokens of the last prefill that the cache already held.
        computed: tokens that the last prefill has computed.
    """

    def __init__(self, engine: Engine, context: int) -> None:
        self.engine = engine
        self.context = context
        self.reused = 0
        self.computed = 0
        self._cache = engine.runner.new_cache(context)

    @property
    def tokens(self) -> list[int]:
        """A copy of the ids of the tokens that the cache holds."""
        return list(self._cache.tokens)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the cache has allocated."""
        return self._cache.nbytes

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: list[int],
        *,
        on_progress: Callable[[int, int], None] | None = None,
        cancel: Cancel | None = None,
    ) -> Tensor:
        """Compute the whole conversation so far, and predict the token that follows.

        The cache keeps the longest prefix that it shares with `token_ids`; the other tokens, at least the
        last one, are computed in chunks. After an error, a cancellation or an interrupt the session keeps the
        chunks that were finished, and the next prefill continues from there.

        Args:
            token_ids: T ids from the start of the conversation.
            on_progress: called with (tokens computed, tokens to compute), first with 0 and then after each
                chunk.
            cancel: checked before every layer.

        Returns:
            Logits after the last token, fp32 [vocab_size].

        Raises:
            RequestError: `token_ids` is empty, does not fit the context or leaves the vocabulary.
            Cancelled: `cancel` was set.
        """
        self.engine._check_tokens(token_ids, self.context)
        self.reused = min(common_prefix(self._cache.tokens, token_ids), len(token_ids) - 1)
        self.computed = 0
        self._cache.truncate(self.reused)
        rest = token_ids[self.reused :]
        if on_progress is not None:
            on_progress(0, len(rest))
        runner, check = self.engine.runner, _checker(cancel)
        for chunk in _chunks(rest, runner.chunk_tokens):
            logits = runner.forward(chunk, self._cache, last_only=True, between_layers=check)
            self.computed += len(chunk)
            if on_progress is not None:
                on_progress(self.computed, len(rest))
        return logits[0]

    @torch.inference_mode()
    def decode(self, token: int) -> Tensor:
        """Append one token, and return the logits of the next: fp32 [vocab_size].

        Raises:
            RequestError: the context is full, or the id is outside the vocabulary.
        """
        held = len(self._cache)
        if held >= self.context:
            raise RequestError(
                f"{held + 1} tokens do not fit the context of {self.context}",
                "Start a new conversation, or load the model with a larger context.",
            )
        self.engine._check_tokens([token], self.context)
        return self.engine.runner.forward([token], self._cache)[0]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading elements that `a` and `b` share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _chunks(token_ids: list[int], size: int) -> list[list[int]]:
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]


def _checker(cancel: Cancel | None) -> Callable[[], None] | None:
    if cancel is None:
        return None
    is_set = cancel.is_set if isinstance(cancel, Event) else cancel

    def check() -> None:
        if is_set():
            raise Cancelled("the prefill was cancelled")

    return check


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_on_gpu(name: str, checkpoint: Checkpoint, options: LoadOptions) -> tuple[Runner, GpuPlan]:
    from moebox.runtime.engine.gpu_runner import load_on_gpu  # a box without a GPU needs none of its imports

    return load_on_gpu(name, checkpoint, options)
