"""Whether a model fits: experts, backbone and cache against the budget or the memory that is free."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.offload.hardware import available_ram_bytes
from moebox.runtime.backbone import planned_bytes
from moebox.runtime.kv_cache import bytes_per_token

log = logging.getLogger("moebox")

SMALLEST_CONTEXT = 512
"""Tokens of cache that a plan must have room for, unless the model or the caller asks for less."""
SYSTEM_SHARE = 0.05
"""Part of the free memory that is left to the system."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a load will take. `experts_fit`: all of them stay in memory, else the page cache holds a part."""

    backbone_bytes: int
    unquantized_backbone_bytes: int
    experts_bytes: int
    context: int
    experts_fit: bool
    note: str = ""
    """What a user may want to know of it: nothing."""


def plan_memory(
    config: ModelConfig, dtype: torch.dtype, backbone: str, ram: int | None, context: int | None
) -> MemoryPlan:
    """Decide the context and whether the experts stay in memory; sizes in bytes, `context` in tokens.

    With a budget everything must fit it. Without one, experts that do not fit the free memory are read
    through the page cache, which is said once.

    Raises:
        PlanError: with the numbers, when it does not fit.
    """
    check_context(config, context)
    per_token = bytes_per_token(config, dtype)
    shapes = config.backbone_shapes()
    backbone_bytes = planned_bytes(shapes, dtype, backbone)
    available = available_ram_bytes()
    room = int(available * (1 - SYSTEM_SHARE)) if ram is None else ram
    smallest = context or min(SMALLEST_CONTEXT, config.max_position_embeddings)
    fixed = backbone_bytes + smallest * per_token
    experts_fit = fixed + config.experts_bytes <= room
    if fixed > room or (ram is not None and not experts_fit):
        raise PlanError(
            _shortage(config, backbone_bytes, smallest, per_token, room, budget=ram is not None),
            "Give a larger RAM budget or a smaller context, or load the backbone as int8 or nf4.",
        )
    if ram is not None and ram > available:
        raise PlanError(
            f"RAM budget of {gib(ram)}, but only {gib(available)} are free", "Give a smaller budget."
        )
    if not experts_fit:
        log.warning(
            "experts take %s, %s of memory are free beside the backbone: they are read from disk as needed, "
            "and decoding runs at the disk's speed",
            gib(config.experts_bytes),
            gib(room - fixed),
        )
    left = room - backbone_bytes - (config.experts_bytes if experts_fit else (room - fixed) // 2)
    return MemoryPlan(
        backbone_bytes,
        planned_bytes(shapes, dtype, "bf16"),
        config.experts_bytes,
        context or min(config.max_position_embeddings, left // per_token),
        experts_fit,
    )


def check_context(config: ModelConfig, context: int | None) -> None:
    """Raise `PlanError` where more tokens, or fewer than one, are asked for than the model goes to."""
    if context is not None and not 1 <= context <= config.max_position_embeddings:
        raise PlanError(
            f"context of {context} tokens; the model goes from 1 to {config.max_position_embeddings}"
        )


def gib(nbytes: float) -> str:
    """`nbytes` as text, in GiB or, if small, in MiB."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def _shortage(
    config: ModelConfig, backbone_bytes: int, context: int, per_token: int, room: int, *, budget: bool
) -> str:
    cache_bytes = context * per_token
    parts = f"backbone {gib(backbone_bytes)} + cache {gib(cache_bytes)} for {context} tokens"
    need = backbone_bytes + cache_bytes
    if budget:
        parts = f"experts {gib(config.experts_bytes)} + {parts}"
        need += config.experts_bytes
    where = "the RAM budget is" if budget else "free memory is"
    return f"the model needs {gib(need)} ({parts}); {where} {gib(room)}"
