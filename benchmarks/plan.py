"""Predictions of `moebox plan` beside measurements of `moebox bench`, with four budgets of RAM or of VRAM.

    python benchmarks/plan.py --model out/tiny-k2
    python benchmarks/plan.py --dir /nvme/tmp --experts 32 --layers 3
    python benchmarks/plan.py --shape kimi-k2 --layers 9 --vram 40GB,80GB,110GB,143GB

Without `--model` a K2-shaped checkpoint of a few layers, with tiny-k2's vocabulary, is written to a new
folder in `--dir` and deleted at the end. With `--shape` a GPU runs random weights. The predictions are then
for the whole shape, with RAM for all of its experts, and the measurements of `--layers` layers are
extrapolated to that depth, as `moebox bench` does. RAM is filled once for all budgets.

Each round first measures the box with an empty profile, then predicts all budgets, and then runs them. The
figures are medians over rounds. Routing is a synthetic trace, and the plan predicts hits from a trace with
another seed. With `--routing model` the model's router picks, and hits are predicted from its statistics.

A line for each budget has the experts that it holds; hits, milliseconds a token and milliseconds of the
token's experts, each as predicted and as measured; and with a GPU the prompt's seconds. The bar is a token's
time within 20 %. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moebox.commands.demo import ASSETS, MODEL
from moebox.commands.options import ByteSize
from moebox.config import ModelConfig, load_config
from moebox.instruments.bench.bench import bench
from moebox.instruments.bench.options import BenchOptions
from moebox.instruments.bench.report import BenchReport
from moebox.instruments.measure.random_model import shape_config
from moebox.instruments.plan.box import Box, BoxOptions, find_box
from moebox.instruments.plan.hits import HitPredictor, find_hit_predictor, published_hit_predictor
from moebox.instruments.plan.report import Plan, PlannedModel, plan_on
from moebox.offload.device.registry import open_device
from moebox.offload.memory.ram_slab import RamSlab
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.cpu_runner import default_dtype

BAR = 0.2
CONTEXT = 1024
WARMUP_TOKENS = 64
SMALL = {"vocab_size": 4096, "intermediate_size": 4096}
"""Sizes that make the backbone of a K2-shaped model small; its experts keep their widths."""
HEADER = (
    "   budget       experts held    hits   bench       ms    bench  error  experts    bench  "
    "prompt s   bench"
)


@dataclass(frozen=True)
class Figures:
    """Predicted or measured figures of a budget.

    Attributes:
        token_ms: milliseconds of a token.
        experts_ms: milliseconds of its experts.
        hits: share of picks that are on the GPU, or, without a GPU, in RAM.
        prompt_s: seconds of the prompt; None: not known.
    """

    token_ms: float
    experts_ms: float
    hits: float
    prompt_s: float | None = None


@dataclass(frozen=True)
class Row:
    """A budget in bytes, the experts that it holds, of how many, and its figures."""

    budget: int
    held: int
    experts: int
    predicted: Figures
    measured: Figures

    @property
    def error(self) -> float:
        """Predicted over measured milliseconds of a token, less 1."""
        return self.predicted.token_ms / self.measured.token_ms - 1


def main() -> None:
    """Compare, in rounds, and print."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="moebox-plan-", dir=options.dir) as folder:
        model, filled = random_shape(options) if options.shape else (checkpoint(folder, options), None)
        predictor = hit_predictor(model, options)
        rounds = []
        for number in range(options.rounds):
            os.environ["XDG_DATA_HOME"] = f"{folder}/{number}"  # not the user's profile
            rows, box = compare(model, predictor, filled, options)
            rounds.append(rows)
    show([median_row(rows) for rows in zip(*rounds, strict=True)], box, options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a quantized checkpoint; else one is made")
    parser.add_argument("--shape", choices=("kimi-k2", "tiny"), help="random weights, on a GPU")
    parser.add_argument("--dir", type=Path, help="where one is made (default: the system's temporary folder)")
    parser.add_argument(
        "--layers", type=int, default=None, help="dense ones included (default: 3, on a GPU 9)"
    )
    parser.add_argument("--experts", type=int, default=48, help="a layer of the checkpoint that is made")
    parser.add_argument("--shares", default="0.3,0.5,0.75,1", help="of the experts that RAM holds")
    parser.add_argument("--vram", default="40GB,80GB,110GB,143GB", help="budgets of the whole shape")
    parser.add_argument("--device", default="cuda", help="of a shape")
    parser.add_argument("--gpu", help="predict from this GPU's data sheet, not from measurements")
    parser.add_argument("--routing", choices=("synthetic", "model"), default="synthetic")
    parser.add_argument("--prompt", type=int, default=None, help="tokens (default: 32, on a GPU 4096)")
    parser.add_argument("--tokens", type=int, default=None, help="decoded (default: 48, on a GPU 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    options = parser.parse_args(arguments)
    usual = {"layers": 9, "prompt": 4096, "tokens": 128} if options.shape else {}
    for name, value in ({"layers": 3, "prompt": 32, "tokens": 48} | usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def checkpoint(folder: str, options: argparse.Namespace) -> PlannedModel:
    """The given checkpoint, or a random one of K2's widths, with INT4 experts in moebox's layout and a
    tokenizer."""
    path = options.model
    if path is None:
        source, path = Path(folder) / "source", Path(folder) / "model"
        sizes = {"layers": options.layers, "experts": options.experts}
        synth(source, "kimi-k2", **sizes, format="int4", config_overrides=SMALL)
        for name in ("tiktoken.model", "tokenizer_config.json"):
            shutil.copy(ASSETS / MODEL / name, source / name)
        quantize(source, path, delete_source=True)
    return PlannedModel(path.name, load_config(path), path)


def random_shape(options: argparse.Namespace) -> tuple[PlannedModel, RamSlab]:
    """The whole shape, and RAM that holds all experts of the layers that run."""
    ram = RamSlab(shape_config(options.shape, options.layers), device=open_device(options.device))
    ram.fill_synthetic()
    return PlannedModel(options.shape, shape_config(options.shape)), ram


def hit_predictor(model: PlannedModel, options: argparse.Namespace) -> HitPredictor:
    """Predicts hits from a synthetic trace, or from the model's statistics."""
    if options.routing == "synthetic":
        return published_hit_predictor(model.config)
    return find_hit_predictor(model.config, model.folder, None)


def compare(
    model: PlannedModel, predictor: HitPredictor, filled: RamSlab | None, options: argparse.Namespace
) -> tuple[list[Row], Box]:
    """Measure the box, plan all budgets, then run each; returns the rows and the box."""
    folders = [] if model.folder is None else [model.folder]
    box = find_box(BoxOptions(gpu=options.gpu), model.config, folders)
    if box is None or box.has_gpu != bool(options.shape):
        raise SystemExit("this box could not be measured, or has no GPU for --shape, or one for a checkpoint")
    boxes = gpu_budgets(box, model.config, options) if options.shape else ram_budgets(box, model, options)
    context = None if options.shape else CONTEXT
    plans = [plan_on(model, budget, predictor, context) for budget in boxes]
    return [row(plan, filled, options) for plan in plans], box


def ram_budgets(box: Box, model: PlannedModel, options: argparse.Namespace) -> list[Box]:
    """The box with a RAM budget for each of the shares of the experts."""
    config, dtype = model.config, default_dtype(model.config, "bf16")
    shares = [float(share) for share in options.shares.split(",")]
    return [replace(box, ram=budget_for_share(config, dtype, "bf16", CONTEXT, share)) for share in shares]


def gpu_budgets(box: Box, config: ModelConfig, options: argparse.Namespace) -> list[Box]:
    """The box with each VRAM budget, and with as much RAM as `moebox bench` plans the whole shape with."""
    budgets = [ByteSize().convert(text, None, None) for text in options.vram.split(",")]
    return [
        replace(box, vram=vram, free_vram=max(vram, box.free_vram), free_ram=2 * config.experts_bytes)
        for vram in budgets
    ]


def row(plan: Plan, filled: RamSlab | None, options: argparse.Namespace) -> Row:
    """Run what was planned."""
    gc.collect()  # frees the memory of the budget before
    report = bench(bench_options(plan, options), filled=filled)
    if report.decode is None:
        raise SystemExit("nothing was decoded")
    predicted = predict(plan, report.decode.cached_tokens + options.tokens // 2, options.prompt)
    placement, box = plan.placement, plan.box
    held = placement.gpu_experts if box.has_gpu else placement.near_experts
    budget = (box.vram if box.has_gpu else box.ram) or 0
    return Row(budget, held, placement.keys, predicted, measured(report))


def bench_options(plan: Plan, options: argparse.Namespace) -> BenchOptions:
    """Options of a run with the plan's budget."""
    common = BenchOptions(
        prompt_tokens=(options.prompt,), decode_tokens=options.tokens, routing=options.routing
    )
    if not options.shape:
        return replace(common, model=plan.model.folder, device="cpu", ram=plan.box.ram, context=CONTEXT)
    return replace(
        common, shape=options.shape, layers=options.layers, device=options.device, vram=plan.box.vram
    )


def predict(plan: Plan, cached_tokens: int, prompt_tokens: int) -> Figures:
    """The plan's figures of a token behind `cached_tokens` others, and of a prompt."""
    token = plan.speed_model.decode(plan.pick_shares, cached_tokens)
    return Figures(
        token_ms=token.seconds * 1e3,
        experts_ms=token.experts_s * 1e3,
        hits=plan.pick_shares.gpu if plan.box.has_gpu else 1 - plan.pick_shares.disk,
        prompt_s=next((prompt.seconds for prompt in plan.prefill if prompt.tokens == prompt_tokens), None),
    )


def measured(report: BenchReport) -> Figures:
    """The run's figures at full depth; means over tokens, as the plan's are, not medians."""
    token, gpu = report.decode, report.ceilings.has_gpu
    assert token is not None
    layer_ms = statistics.mean(layer.seconds - layer.wait_s for layer in token.layers) * 1e3
    return Figures(
        token_ms=token.full_depth.token_s * 1e3,
        experts_ms=token.full_depth.moe_layers * layer_ms,
        hits=token.hit_rate if gpu else token.in_memory,
        prompt_s=report.prefill[-1].full_depth_s if gpu else None,
    )


def median_row(rows: Sequence[Row]) -> Row:
    """The rounds of one budget as one row, with the median of each figure."""
    predicted, measured = ([getattr(row, side) for row in rows] for side in ("predicted", "measured"))
    return replace(rows[0], predicted=median(predicted), measured=median(measured))


def median(found: Sequence[Figures]) -> Figures:
    """The median of each figure that is known in all rounds."""
    columns = {name: [getattr(one, name) for one in found] for name in asdict(found[0])}
    known = {name: values for name, values in columns.items() if None not in values}
    return Figures(**{name: statistics.median(values) for name, values in known.items()})


def show(rows: list[Row], box: Box, options: argparse.Namespace) -> None:
    """Print a line for each budget, then the JSON object."""
    worst = max(abs(row.error) for row in rows)
    if not options.json:
        print(HEADER)
        for row in rows:
            print(line(row))
        print(f"largest error {worst:.0%}: bar {BAR:.0%} {'met' if worst <= BAR else 'missed'}")
        for source in box.sources:
            print(f"  {source}")
    result = {
        "rows": [asdict(row) | {"error": row.error} for row in rows],
        "worst": worst,
        "bar": BAR,
        "ceilings": box.ceilings.to_dict(),
        "efficiency": box.efficiency.to_dict(),
    }
    print(json.dumps(result))


def line(row: Row) -> str:
    """A budget's figures, each as predicted and then as measured."""
    predicted, measured = row.predicted, row.measured
    prompts = [
        f"{value:8.2f}" if value is not None else f"{'-':>8}"
        for value in (predicted.prompt_s, measured.prompt_s)
    ]
    return (
        f"{row.budget / 1e9:6.2f} GB {row.held:>7,} of {row.experts:>7,} "
        f"{predicted.hits:7.1%} {measured.hits:7.1%} "
        f"{predicted.token_ms:8.1f} {measured.token_ms:8.1f}  {row.error:+5.0%} "
        f"{predicted.experts_ms:8.1f} {measured.experts_ms:8.1f} {prompts[0]} {prompts[1]}"
    )


if __name__ == "__main__":
    main()
