"""`moebox plan`: what goes where, how often it will be found there, how fast that runs, and what would help.

Nothing is loaded, and no weights are needed: a checkpoint's `config.json`, the hub's, or a shape will do.
Memory is shared out by the planners that loading obeys (`memory.py`, `gpu_memory.py`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moebox.config import load_config, parse_config
from moebox.errors import PlanError, RequestError
from moebox.instruments.measure.random_model import Shape, shape_config
from moebox.instruments.plan.box import BoxOptions, find_box
from moebox.instruments.plan.hits import find_curve
from moebox.instruments.plan.placement import cpu_places, gpu_places
from moebox.instruments.plan.report import Plan, Subject, plan_on, predict
from moebox.instruments.plan.text import plan_line
from moebox.instruments.plan.what_if import changes
from moebox.runtime.engine.cpu_plan import MemoryPlan
from moebox.runtime.model.precision import check_precision
from moebox.units import GIGA

if TYPE_CHECKING:
    from moebox.quantize.source.hub import HubSource
    from moebox.runtime.engine.engine import Engine

LATER_CONTEXT = 262144
"""Tokens of K2's later releases, of the same shape."""


@dataclass(frozen=True)
class PlanOptions:
    """What `moebox plan` is asked.

    Attributes:
        model: a checkpoint's folder, or a hub id; or None, with
        shape: "kimi-k2" or "tiny".
        box: the box, as far as it is not this one.
        context: tokens; None: what the planner gives.
        backbone: "bf16", or without a GPU "int8" or "nf4".
        trace: a file of `--record-trace` to predict hits from.
        stores: folders with more copies of the shards.
    """

    model: str | None = None
    shape: Shape | None = None
    box: BoxOptions = field(default_factory=BoxOptions)
    context: int | None = None
    backbone: str = "bf16"
    trace: Path | None = None
    stores: tuple[Path, ...] = ()


def make_plan(options: PlanOptions) -> Plan:
    """Plan without loading anything.

    Raises:
        PlanError: it does not fit; the message has the numbers and what is missing.
        RequestError: neither a model nor a shape, or both; a trace that is none.
        ConfigError, CheckpointError: the model's small files cannot be read.
    """
    check_precision(options.backbone)
    subject = find_subject(options)
    folders = [folder for folder in (subject.folder, *options.stores) if folder is not None]
    box = find_box(options.box, subject.config, folders)
    if box is None:
        raise PlanError("this box could not be measured", "Run: moebox doctor")
    curve = find_curve(subject.config, subject.folder, options.trace)
    made = plan_on(subject, box, curve, options.context, options.backbone)
    return replace(made, changes=changes(made, curve, options.context, options.backbone))


def loaded_line(engine: Engine) -> str:
    """The plan that a loaded model obeys, in one line; with its speed where this box was measured before."""
    config, plan = engine.config, engine.plan
    places = cpu_places(config, plan) if isinstance(plan, MemoryPlan) else gpu_places(config, plan)
    box = find_box(BoxOptions(), config, [engine.folder], measure=False)
    if box is None or box.has_gpu == isinstance(plan, MemoryPlan):
        return plan_line(places, config)
    subject = Subject(engine.folder.resolve().name, config, engine.folder)
    made = predict(subject, box, find_curve(config, engine.folder, None), places, engine.dtype)
    return plan_line(places, config, made.tokens_per_s)


def find_subject(options: PlanOptions) -> Subject:
    """The model that is meant: its config, from a folder, the hub's headers, or a shape.

    Raises:
        RequestError, ConfigError, CheckpointError: as `make_plan`.
    """
    if (options.model is None) == (options.shape is None):
        raise RequestError("nothing to plan", "Give a checkpoint's folder, a hub id, or --shape kimi-k2.")
    if options.model is None:
        return _shape_subject(options.shape or "kimi-k2", options.context)
    folder = Path(options.model)
    if folder.exists():
        return Subject(folder.resolve().name, load_config(folder), folder)
    return _hub_subject(options.model)


def _shape_subject(shape: Shape, context: int | None) -> Subject:
    config = shape_config(shape)
    if shape == "kimi-k2" and config.max_position_embeddings < (context or 0) <= LATER_CONTEXT:
        later = replace(config, max_position_embeddings=LATER_CONTEXT)
        return Subject(shape, later, note=f"with {LATER_CONTEXT:,} tokens, as K2 has since the 0905 release")
    return Subject(shape, config)


def _hub_subject(name: str) -> Subject:
    """A model on the hub: small files and headers come to a temporary folder, no weights."""
    from moebox.quantize.source.base import HeaderStore
    from moebox.quantize.source.hub import HubSource, parse_hub_id

    parsed = parse_hub_id(name)
    if parsed is None:
        raise RequestError(f"{name}: no such folder", "Give a checkpoint's folder, or a hub id, org/model.")
    with tempfile.TemporaryDirectory(prefix="moebox-plan-") as folder:
        source = HubSource(*parsed, Path(folder), HeaderStore(Path(folder) / "headers"))
        try:
            return Subject(name, parse_config(source.config, f"{name}: config.json"), note=_hub_note(source))
        finally:
            source.close()


def _hub_note(source: HubSource) -> str:
    nbytes = sum(facts.size for facts in source.facts.values())
    packed = any(name.endswith(".weight_packed") for name in source.weight_map)
    state = "has INT4 experts already" if packed else "`moebox quantize` makes its experts INT4"
    return f"{nbytes / GIGA:,.0f} GB in {len(source.facts)} shards on the hub; {state}"
