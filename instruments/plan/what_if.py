"""What would help most: the same plan on a box with one part changed, or with a shorter context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moebox.errors import PlanError
from moebox.instruments.plan.box import Box, with_gpu
from moebox.instruments.plan.gpus import PRESETS, next_larger
from moebox.instruments.plan.hits import HitCurve
from moebox.instruments.plan.report import Change, Plan, plan_on
from moebox.runtime.engine.plan_parts import SYSTEM_SHARE
from moebox.units import gib

RAM_STEP = 64 << 30
SHORTER_CONTEXT = 32768
FIRST_GPU = "rtx-5090-32gb"
"""What a box without a GPU is compared with."""


def changes(plan: Plan, curve: HitCurve, context: int | None, backbone: str) -> tuple[Change, ...]:
    """Each change that makes sense on this box, the most useful first; those that do not fit are left out."""
    found = []
    for what, box, tokens in _variants(plan, context):
        try:
            other = plan_on(plan.subject, box, curve, tokens, "bf16" if box.has_gpu else backbone)
        except PlanError:
            continue
        found.append(Change(what, other.tokens_per_s, other.tokens_per_s / plan.tokens_per_s - 1))
    return tuple(sorted(found, key=lambda change: -change.gain))


def _variants(plan: Plan, context: int | None) -> Iterator[tuple[str, Box, int | None]]:
    box, ceilings = plan.box, plan.box.ceilings
    if plan.places.disk_experts:
        enough = _ram_for_all(plan)
        yield f"RAM for all experts: {gib(enough)}", replace(box, ram=None, free_ram=enough), context
        more = replace(ceilings, nvme_gbps=2 * ceilings.nvme_gbps)
        yield f"a second drive: {more.nvme_gbps:g} GB/s together", replace(box, ceilings=more), context
    if plan.chances.ram > 0:
        more = replace(ceilings, ram_gbps=2 * ceilings.ram_gbps)
        yield f"RAM and CPU twice as fast: {more.ram_gbps:,.0f} GB/s", replace(box, ceilings=more), context
    preset = PRESETS[FIRST_GPU] if not box.has_gpu else box.preset and next_larger(box.preset)
    if preset:
        yield (
            f"{'a GPU' if not box.has_gpu else 'a larger GPU'}: {preset.title}",
            with_gpu(box, preset),
            context,
        )
    if plan.places.context > SHORTER_CONTEXT:
        yield f"a context of {SHORTER_CONTEXT:,} tokens", box, SHORTER_CONTEXT


def _ram_for_all(plan: Plan) -> int:
    """The next size of memory with which no expert stays on the disk."""
    missing = plan.places.disk_experts * plan.subject.config.expert_bytes
    needed = (plan.box.ram_room + missing) / (1 - SYSTEM_SHARE)
    step = RAM_STEP if needed > RAM_STEP else 1 << 30
    return int(-(-needed // step)) * step
