"""What the memory plans of CPU and GPU have in common: the backbone's part, limits, and router statistics."""

from __future__ import annotations

from dataclasses import dataclass

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.offload.routing.counts import RECENT_TOKENS
from moebox.units import gib

SMALLEST_CONTEXT = 512
"""Tokens of cache that a plan must have room for, unless the model or the caller asks for less."""
SYSTEM_SHARE = 0.05
"""Share of the free RAM that a plan leaves to the system."""
CACHE_SHARE = 0.15
"""Share of the memory beside the backbone that the cache may take where no context was asked for. On a CPU
it limits the cache only where not all experts fit RAM."""


@dataclass(frozen=True)
class BackbonePlan:
    """What the backbone takes, and its work on one conversation.

    Attributes:
        context: tokens that a conversation may hold.
        chunk_tokens: tokens of a prompt that go through the model together.
        backbone_bytes: the backbone as loaded.
        kv_bytes: the cache of a conversation of `context` tokens.
        workspace_bytes: the most that a chunk's intermediate values take.
    """

    context: int
    chunk_tokens: int
    backbone_bytes: int
    kv_bytes: int
    workspace_bytes: int

    def describe_cache(self) -> str:
        """Backbone and cache in words."""
        return f"backbone {gib(self.backbone_bytes)} + cache {gib(self.kv_bytes)} for {self.context} tokens"


def check_context(config: ModelConfig, context: int | None) -> None:
    """Raise `PlanError` where more tokens, or fewer than one, are asked for than the model goes to."""
    if context is not None and not 1 <= context <= config.max_position_embeddings:
        raise PlanError(
            f"context of {context} tokens; the model goes from 1 to {config.max_position_embeddings}"
        )


def check_budget(memory: str, budget_bytes: int | None, free_bytes: int) -> None:
    """Raise `PlanError` where a budget of this memory ("RAM" or "VRAM") exceeds what is free."""
    if budget_bytes is not None and budget_bytes > free_bytes:
        raise PlanError(
            f"{memory} budget of {gib(budget_bytes)}, but only {gib(free_bytes)} are free",
            "Give a smaller budget.",
        )


def ram_room_bytes(budget_bytes: int | None, free_bytes: int) -> int:
    """RAM that a plan may use: the budget, else what is free without the system's share."""
    return int(free_bytes * (1 - SYSTEM_SHARE)) if budget_bytes is None else budget_bytes


def tokens_in_cache_share(room_bytes: int, token_bytes: int) -> int:
    """Tokens of cache that fit `CACHE_SHARE` of the memory beside the backbone."""
    return int(room_bytes * CACHE_SHARE) // token_bytes


def clamp_context(config: ModelConfig, tokens: int) -> int:
    """At least `SMALLEST_CONTEXT`, at most what the model goes to."""
    return min(max(tokens, SMALLEST_CONTEXT), config.max_position_embeddings)


def learned_bytes(config: ModelConfig, residencies: int) -> int:
    """RAM for what is learned of the router, in bytes.

    `2 * (uses + pairs + recent) + residencies * 12 * L * E**2`: the statistics of earlier runs and of this
    run (`offload/routing/counts.py`), and the value model of each residency
    (`offload/csrc/residency/value_model.h`).
    """
    layers, experts = len(config.moe_layers), config.n_routed_experts
    uses, pairs = 16 * layers * experts, 4 * (layers - 1) * experts**2
    recent = 2 * RECENT_TOKENS * layers * config.num_experts_per_tok
    return 2 * (uses + pairs + recent) + residencies * 12 * layers * experts**2
