"""What `moebox plan` predicts beside what `moebox bench` measures, with four budgets of RAM or of VRAM.

    python benchmarks/plan.py --model out/tiny-k2
    python benchmarks/plan.py --dir /nvme/tmp --experts 32 --layers 3
    python benchmarks/plan.py --shape kimi-k2 --layers 9 --vram 40GB,80GB,110GB,143GB

Without `--model` a K2-shaped checkpoint of a few layers, with tiny-k2's vocabulary, is written to `--dir`,
and deleted in the end. With `--shape` a GPU runs random weights: the predictions are of the whole shape with
RAM for all of its experts, as `moebox plan` makes them, and what `--layers` take is scaled to that depth, as
`moebox bench` does. RAM is filled once for all budgets.

In each round the box is measured first, as if nothing were known of it; then all predictions are made, and
then the budgets are run. Medians over rounds. Routing is a synthetic trace, and the plan's hits come from
another one (another seed); with `--routing model` it is the model's own, and hits come from what its
statistics know.

Printed per budget: experts that it holds; hits, milliseconds a token and what of them the experts take,
predicted and measured; with a GPU the prompt's seconds. The bar is a token's time within 20 %. The last line
is one JSON object.
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
from moebox.instruments.plan.hits import HitCurve, find_curve, published_curve
from moebox.instruments.plan.report import Plan, Subject, plan_on
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
"""What makes the backbone of a K2-shaped model small; the tokens' experts stay as they are."""
HEADER = (
    "   budget       experts held    hits   bench       ms    bench  error  experts    bench  "
    "prompt s   bench"
)


@dataclass(frozen=True)
class Found:
    """Of a budget, predicted or measured: a token's milliseconds, those of its experts, the share of picks
    that hit (in RAM, or on the GPU), and the prompt's seconds where they are known."""

    token_ms: float
    experts_ms: float
    hits: float
    prompt_s: float | None = None


@dataclass(frozen=True)
class Row:
    """A budget in bytes, and how many of all experts it holds."""

    budget: int
    held: int
    experts: int
    predicted: Found
    measured: Found

    @property
    def error(self) -> float:
        """Of the prediction, over what was measured."""
        return self.predicted.token_ms / self.measured.token_ms - 1


def main() -> None:
    """Run as the options say."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="moebox-plan-", dir=options.dir) as folder:
        subject, filled = random_shape(options) if options.shape else (checkpoint(folder, options), None)
        curve = hit_curve(subject, options)
        rounds = []
        for number in range(options.rounds):
            os.environ["XDG_DATA_HOME"] = f"{folder}/{number}"  # the user's profile stays as it is
            rows, box = compare(subject, curve, filled, options)
            rounds.append(rows)
    show([middle(rows) for rows in zip(*rounds, strict=True)], box, options)


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


def checkpoint(folder: str, options: argparse.Namespace) -> Subject:
    """The one that was given, or a random INT4 one of K2's widths, in moebox's layout, with a tokenizer."""
    path = options.model
    if path is None:
        source, path = Path(folder) / "source", Path(folder) / "model"
        sizes = {"layers": options.layers, "experts": options.experts}
        synth(source, "kimi-k2", **sizes, format="int4", config_overrides=SMALL)
        for name in ("tiktoken.model", "tokenizer_config.json"):
            shutil.copy(ASSETS / MODEL / name, source / name)
        quantize(source, path, delete_source=True)
    return Subject(path.name, load_config(path), path)


def random_shape(options: argparse.Namespace) -> tuple[Subject, RamSlab]:
    """The whole shape, and RAM with all experts of the layers that run."""
    ram = RamSlab(shape_config(options.shape, options.layers), device=open_device(options.device))
    ram.fill_synthetic()
    return Subject(options.shape, shape_config(options.shape)), ram


def hit_curve(subject: Subject, options: argparse.Namespace) -> HitCurve:
    """How the model routes, or what stands for it."""
    if options.routing == "synthetic":
        return published_curve(subject.config)
    return find_curve(subject.config, subject.folder, None)


def compare(
    subject: Subject, curve: HitCurve, filled: RamSlab | None, options: argparse.Namespace
) -> tuple[list[Row], Box]:
    """Measure the box, predict all budgets, then measure each."""
    folders = [] if subject.folder is None else [subject.folder]
    box = find_box(BoxOptions(gpu=options.gpu), subject.config, folders)
    if box is None or box.has_gpu != bool(options.shape):
        raise SystemExit("this box could not be measured, or has no GPU for --shape, or one for a checkpoint")
    boxes = gpu_budgets(box, subject.config, options) if options.shape else ram_budgets(box, subject, options)
    context = None if options.shape else CONTEXT
    plans = [plan_on(subject, budget, curve, context) for budget in boxes]
    return [row(plan, filled, options) for plan in plans], box


def ram_budgets(box: Box, subject: Subject, options: argparse.Namespace) -> list[Box]:
    """With each, RAM holds one of the shares of the experts."""
    config, dtype = subject.config, default_dtype(subject.config, "bf16")
    shares = [float(share) for share in options.shares.split(",")]
    return [replace(box, ram=budget_for_share(config, dtype, "bf16", CONTEXT, share)) for share in shares]


def gpu_budgets(box: Box, config: ModelConfig, options: argparse.Namespace) -> list[Box]:
    """Each of the GPU's, beside as much RAM as `moebox bench` takes the whole shape to have."""
    budgets = [ByteSize().convert(text, None, None) for text in options.vram.split(",")]
    return [
        replace(box, vram=vram, free_vram=max(vram, box.free_vram), free_ram=2 * config.experts_bytes)
        for vram in budgets
    ]


def row(plan: Plan, filled: RamSlab | None, options: argparse.Namespace) -> Row:
    """Measure what was planned."""
    gc.collect()  # the budget before may have left memory behind
    report = bench(bench_options(plan, options), filled=filled)
    if report.decode is None:
        raise SystemExit("nothing was decoded")
    predicted = predict(plan, report.decode.cached_tokens + options.tokens // 2, options.prompt)
    places, box = plan.places, plan.box
    held = places.gpu_experts if box.has_gpu else places.near_experts
    budget = (box.vram if box.has_gpu else box.ram) or 0
    return Row(budget, held, places.keys, predicted, measured(report))


def bench_options(plan: Plan, options: argparse.Namespace) -> BenchOptions:
    """What runs as it was planned."""
    common = BenchOptions(
        prompt_tokens=(options.prompt,), decode_tokens=options.tokens, routing=options.routing
    )
    if not options.shape:
        return replace(common, model=plan.subject.folder, device="cpu", ram=plan.box.ram, context=CONTEXT)
    return replace(
        common, shape=options.shape, layers=options.layers, device=options.device, vram=plan.box.vram
    )


def predict(plan: Plan, cached_tokens: int, prompt_tokens: int) -> Found:
    """What the plan says of a token behind so many others, and of a prompt."""
    token = plan.speeds.decode(plan.chances, cached_tokens)
    return Found(
        token_ms=token.seconds * 1e3,
        experts_ms=token.experts_s * 1e3,
        hits=plan.chances.gpu if plan.box.has_gpu else 1 - plan.chances.disk,
        prompt_s=next((prompt.seconds for prompt in plan.prefill if prompt.tokens == prompt_tokens), None),
    )


def measured(report: BenchReport) -> Found:
    """What the bench says, at full depth: means over tokens, as the plan's. Where few experts are missing,
    most tokens are faster than their mean."""
    token, gpu = report.decode, report.ceilings.has_gpu
    assert token is not None
    layer_ms = statistics.mean(layer.seconds - layer.wait_s for layer in token.layers) * 1e3
    return Found(
        token_ms=token.full_depth.token_s * 1e3,
        experts_ms=token.full_depth.moe_layers * layer_ms,
        hits=token.hit_rate if gpu else token.in_memory,
        prompt_s=report.prefill[-1].full_depth_s if gpu else None,
    )


def middle(rows: Sequence[Row]) -> Row:
    """The median of each figure, for one budget."""
    predicted, seen = ([getattr(row, side) for row in rows] for side in ("predicted", "measured"))
    return replace(rows[0], predicted=median(predicted), measured=median(seen))


def median(found: Sequence[Found]) -> Found:
    """Of each figure."""
    columns = {name: [getattr(one, name) for one in found] for name in asdict(found[0])}
    known = {name: values for name, values in columns.items() if None not in values}
    return Found(**{name: statistics.median(values) for name, values in known.items()})


def show(rows: list[Row], box: Box, options: argparse.Namespace) -> None:
    """A line per budget, then the object."""
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
    """A budget's figures, each prediction before what was measured."""
    said, seen = row.predicted, row.measured
    prompts = [
        f"{value:8.2f}" if value is not None else f"{'-':>8}" for value in (said.prompt_s, seen.prompt_s)
    ]
    return (
        f"{row.budget / 1e9:6.2f} GB {row.held:>7,} of {row.experts:>7,} "
        f"{said.hits:7.1%} {seen.hits:7.1%} {said.token_ms:8.1f} {seen.token_ms:8.1f}  {row.error:+5.0%} "
        f"{said.experts_ms:8.1f} {seen.experts_ms:8.1f} {prompts[0]} {prompts[1]}"
    )


if __name__ == "__main__":
    main()
