"""`moebox plan`: what lies where, how often picks hit, how fast that runs, and which change would help.

Nothing is loaded and no weights are needed: the `config.json` of a checkpoint or of a model on the hub, or a
shape suffices. Memory is planned by the code that loading uses (`runtime/engine/cpu_plan.py`, `gpu_plan.py`).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moebox.config import load_config, parse_config
from moebox.errors import PlanError, RequestError
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan.box import BoxOptions, find_box
from moebox.instruments.plan.hits import find_hit_predictor
from moebox.instruments.plan.placement import cpu_placement, gpu_placement
from moebox.instruments.plan.report import Plan, PlannedModel, plan_on, predict
from moebox.instruments.plan.text import plan_line
from moebox.instruments.plan.what_if import changes
from moebox.quantize.synth import Shape
from moebox.runtime.engine.cpu_plan import CpuPlan
from moebox.runtime.model.precision import check_precision
from moebox.units import GIGA

if TYPE_CHECKING:
    from moebox.quantize.source.hub import HubSource
    from moebox.runtime.engine.engine import Engine

LATER_CONTEXT = 262144
"""Context, in tokens, of K2's releases since 0905, which have the same shape."""


@dataclass(frozen=True)
class PlanOptions:
    """What `moebox plan` plans; either `model` or `shape` is given.

    Attributes:
        model: a checkpoint's folder, or a hub id.
        shape: "kimi-k2" or "tiny".
        box: what differs from this box.
        context: tokens of cache; None: what the planner chooses.
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
        RequestError: neither a model nor a shape is given, or both are; or the trace is not usable.
        ConfigError, CheckpointError: the model's small files cannot be read.
    """
    check_precision(options.backbone)
    model = find_model(options)
    folders = [folder for folder in (model.folder, *options.stores) if folder is not None]
    box = find_box(options.box, model.config, folders)
    if box is None:
        raise PlanError("this box could not be measured", "Run: moebox doctor")
    predictor = find_hit_predictor(model.config, model.folder, options.trace)
    plan = plan_on(model, box, predictor, options.context, options.backbone)
    return replace(plan, changes=changes(plan, predictor, options.context, options.backbone))


def loaded_line(engine: Engine) -> str:
    """The plan that a loaded model obeys, in one line; with its speed if this box was measured before."""
    config, plan = engine.config, engine.plan
    on_cpu = isinstance(plan, CpuPlan)
    placement = cpu_placement(config, plan) if isinstance(plan, CpuPlan) else gpu_placement(config, plan)
    box = find_box(BoxOptions(), config, [engine.folder], measure=False)
    if box is None or box.has_gpu == on_cpu:
        return plan_line(placement, config)
    model = PlannedModel(engine.folder.resolve().name, config, engine.folder)
    predictor = find_hit_predictor(config, engine.folder, None)
    return plan_line(placement, config, predict(model, box, predictor, placement, engine.dtype).tokens_per_s)


def find_model(options: PlanOptions) -> PlannedModel:
    """The config of a folder, of the hub's headers, or of a shape.

    Raises:
        RequestError, ConfigError, CheckpointError: as `make_plan`.
    """
    if (options.model is None) == (options.shape is None):
        raise RequestError("nothing to plan", "Give a checkpoint's folder, a hub id, or --shape kimi-k2.")
    if options.model is None:
        return _shape_model(options.shape or "kimi-k2", options.context)
    folder = Path(options.model)
    if folder.exists():
        return PlannedModel(folder.resolve().name, load_config(folder), folder)
    return _hub_model(options.model)


def _shape_model(shape: Shape, context: int | None) -> PlannedModel:
    config = shape_config(shape)
    if shape == "kimi-k2" and config.max_position_embeddings < (context or 0) <= LATER_CONTEXT:
        later = replace(config, max_position_embeddings=LATER_CONTEXT)
        return PlannedModel(
            shape, later, note=f"with {LATER_CONTEXT:,} tokens, as K2 has since the 0905 release"
        )
    return PlannedModel(shape, config)


def _hub_model(name: str) -> PlannedModel:
    """A model on the hub; its small files and headers, not its weights, go to a temporary folder."""
    from moebox.quantize.source.base import HeaderStore
    from moebox.quantize.source.hub import HubSource, parse_hub_id

    parsed = parse_hub_id(name)
    if parsed is None:
        raise RequestError(f"{name}: no such folder", "Give a checkpoint's folder, or a hub id, org/model.")
    with tempfile.TemporaryDirectory(prefix="moebox-plan-") as folder:
        source = HubSource(*parsed, Path(folder), HeaderStore(Path(folder) / "headers"))
        try:
            return PlannedModel(
                name, parse_config(source.config, f"{name}: config.json"), note=_hub_note(source)
            )
        finally:
            source.close()


def _hub_note(source: HubSource) -> str:
    nbytes = sum(facts.size for facts in source.facts.values())
    packed = any(name.endswith(".weight_packed") for name in source.weight_map)
    state = "has INT4 experts already" if packed else "`moebox quantize` makes its experts INT4"
    return f"{nbytes / GIGA:,.0f} GB in {len(source.facts)} shards on the hub; {state}"
