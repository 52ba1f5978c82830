"""Which change would help most: the plan again, on a box with one part changed or with a shorter context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moebox.errors import PlanError
from moebox.instruments.plan.box import RAM_STEP, Box, ram_to_buy, with_gpu
from moebox.instruments.plan.gpus import PRESETS, next_larger
from moebox.instruments.plan.hits import HitPredictor
from moebox.instruments.plan.report import Change, Plan, plan_on
from moebox.runtime.engine.plan_parts import SYSTEM_SHARE
from moebox.units import gib

SHORTER_CONTEXT = 32768
SMALL_RAM_STEP = 1 << 30
"""Step, in bytes, of RAM below `RAM_STEP`."""
FIRST_GPU = "rtx-5090-32gb"
"""The GPU that is tried in a box without one."""


def changes(plan: Plan, predictor: HitPredictor, context: int | None, backbone: str) -> tuple[Change, ...]:
    """Plan each change of the box that makes sense; the largest gain first, without those that do not fit."""
    found = []
    for what, box, tokens in _variants(plan, context):
        try:
            other = plan_on(plan.model, box, predictor, tokens, "bf16" if box.has_gpu else backbone)
        except PlanError:
            continue
        found.append(Change(what, other.tokens_per_s, other.tokens_per_s / plan.tokens_per_s - 1))
    return tuple(sorted(found, key=lambda change: -change.gain))


def _variants(plan: Plan, context: int | None) -> Iterator[tuple[str, Box, int | None]]:
    """(what changes, the changed box, the context) of each change."""
    box, ceilings = plan.box, plan.box.ceilings
    if plan.placement.disk_experts:
        enough = _ram_for_all(plan)
        yield f"RAM for all experts: {gib(enough)}", replace(box, ram=None, free_ram=enough), context
        more = replace(ceilings, nvme_gbps=2 * ceilings.nvme_gbps)
        yield f"a second drive: {more.nvme_gbps:g} GB/s together", replace(box, ceilings=more), context
    if plan.pick_shares.ram > 0:
        more = replace(ceilings, ram_gbps=2 * ceilings.ram_gbps)
        yield f"RAM and CPU twice as fast: {more.ram_gbps:,.0f} GB/s", replace(box, ceilings=more), context
    preset = PRESETS[FIRST_GPU] if not box.has_gpu else box.preset and next_larger(box.preset)
    if preset:
        what = "a larger GPU" if box.has_gpu else "a GPU"
        yield f"{what}: {preset.title}", with_gpu(box, preset), context
    if plan.placement.context > SHORTER_CONTEXT:
        yield f"a context of {SHORTER_CONTEXT:,} tokens", box, SHORTER_CONTEXT


def _ram_for_all(plan: Plan) -> int:
    """The next size of RAM with which no expert stays on the disk."""
    missing = plan.placement.disk_experts * plan.model.config.expert_bytes
    needed = (plan.box.ram_room + missing) / (1 - SYSTEM_SHARE)
    return ram_to_buy(needed, RAM_STEP if needed > RAM_STEP else SMALL_RAM_STEP)
