"""What `moebox plan` predicts of decoding beside what `moebox bench` measures, at four RAM budgets.

    python benchmarks/plan.py --model out/tiny-k2
    python benchmarks/plan.py --dir /nvme/tmp --experts 32 --layers 3

Without `--model` a K2-shaped checkpoint of a few layers, with tiny-k2's vocabulary, is written to `--dir`,
and deleted in the end. In each round the box is measured first, as if nothing were known of it; then all
predictions are made, and then the budgets are run. Medians over rounds. Routing is a synthetic trace, and the
plan's hits come from another one (another seed); with `--routing model` it is the model's own, and
hits come from what its statistics know.

Printed per budget: RAM, experts in RAM, hits and milliseconds a token, predicted and measured. The bar is a
prediction within 20 %. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from moebox.config import load_config
from moebox.demo import ASSETS, MODEL
from moebox.quantize.convert import quantize
from moebox.quantize.synth import synth
from moebox.runtime.bench import bench
from moebox.runtime.bench_rigs import BenchOptions
from moebox.runtime.memory import budget_for_share
from moebox.runtime.plan_box import Box, BoxOptions, find_box
from moebox.runtime.plan_hits import HitCurve, find_curve, published_curve
from moebox.runtime.plan_report import Plan, Subject, plan_on
from moebox.runtime.runner import default_dtype

BAR = 0.2
CONTEXT = 1024
PROMPT_TOKENS = 32
WARMUP_TOKENS = 64
SMALL = {"vocab_size": 4096, "intermediate_size": 4096}
"""What makes the backbone of a K2-shaped model small; the tokens' experts stay as they are."""


@dataclass(frozen=True)
class Row:
    """A budget: what was predicted, and what was measured."""

    share: float
    ram_bytes: int
    near_experts: int
    experts: int
    predicted_ms: float
    measured_ms: float
    predicted_in_ram: float
    measured_in_ram: float

    @property
    def error(self) -> float:
        """Of the prediction, over what was measured."""
        return self.predicted_ms / self.measured_ms - 1


def main() -> None:
    """Run as the options say."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="moebox-plan-", dir=options.dir) as folder:
        model = options.model or make_model(Path(folder) / "model", options.layers, options.experts)
        curve = hit_curve(model, options)
        rounds = []
        for number in range(options.rounds):
            os.environ["XDG_DATA_HOME"] = f"{folder}/{number}"  # the user's profile stays as it is
            rows, box = compare(model, curve, options)
            rounds.append(rows)
    show([middle(rows) for rows in zip(*rounds, strict=True)], box, options)


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a quantized checkpoint; else one is made")
    parser.add_argument("--dir", type=Path, help="where it is made (default: the system's temporary folder)")
    parser.add_argument("--layers", type=int, default=3, help="of the one that is made, one dense")
    parser.add_argument("--experts", type=int, default=48, help="a layer of it")
    parser.add_argument("--shares", default="0.3,0.5,0.75,1", help="of the experts that RAM holds")
    parser.add_argument("--routing", choices=("synthetic", "model"), default="synthetic")
    parser.add_argument("--tokens", type=int, default=48, help="decoded per budget")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    return parser.parse_args()


def make_model(folder: Path, layers: int, experts: int) -> Path:
    """A random INT4 checkpoint of K2's widths, in moebox's layout, with a tokenizer."""
    source = folder.with_name("source")
    synth(source, "kimi-k2", layers=layers, experts=experts, format="int4", config_overrides=SMALL)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(ASSETS / MODEL / name, source / name)
    quantize(source, folder, delete_source=True)
    return folder


def hit_curve(model: Path, options: argparse.Namespace) -> HitCurve:
    """How the model routes, or what stands for it."""
    config = load_config(model)
    return published_curve(config) if options.routing == "synthetic" else find_curve(config, model, None)


def compare(model: Path, curve: HitCurve, options: argparse.Namespace) -> tuple[list[Row], Box]:
    """Measure the box, predict all budgets, then measure each."""
    box = find_box(BoxOptions(), load_config(model), [model])
    if box is None:
        raise SystemExit("this box could not be measured")
    shares = [float(share) for share in options.shares.split(",")]
    plans = [plan_share(model, box, curve, share) for share in shares]
    return [row(model, share, plan, options) for share, plan in zip(shares, plans, strict=True)], box


def plan_share(model: Path, box: Box, curve: HitCurve, share: float) -> Plan:
    """The plan of a budget with which RAM holds `share` of the experts."""
    config = load_config(model)
    budget = budget_for_share(config, default_dtype(config, "bf16"), "bf16", CONTEXT, share)
    return plan_on(Subject(model.name, config, model), replace(box, ram=budget), curve, CONTEXT)


def row(model: Path, share: float, plan: Plan, options: argparse.Namespace) -> Row:
    """Measure what was planned."""
    report = bench(
        BenchOptions(
            model=model,
            device="cpu",
            ram=plan.box.ram,
            context=CONTEXT,
            prompt_tokens=(PROMPT_TOKENS,),
            decode_tokens=options.tokens,
            routing=options.routing,
        )
    ).decode
    if report is None:
        raise SystemExit("nothing was decoded")
    cached = PROMPT_TOKENS + WARMUP_TOKENS + options.tokens // 2
    return Row(
        share=share,
        ram_bytes=plan.box.ram or 0,
        near_experts=plan.places.near_experts,
        experts=plan.places.keys,
        predicted_ms=plan.speeds.decode(plan.chances, cached).seconds * 1e3,
        measured_ms=report.token_p50_s * 1e3,
        predicted_in_ram=1 - plan.chances.disk,
        measured_in_ram=report.in_memory,
    )


def middle(rows: Sequence[Row]) -> Row:
    """The median of each time, for one budget."""
    names = ("predicted_ms", "measured_ms")
    times = {name: statistics.median(getattr(row, name) for row in rows) for name in names}
    return replace(rows[0], **times)


def show(rows: list[Row], box: Box, options: argparse.Namespace) -> None:
    """A line per budget, then the object."""
    worst = max(abs(row.error) for row in rows)
    if not options.json:
        print(f"{'experts in RAM':>18}  {'MiB':>8}  {'hits':>6} {'seen':>6}  {'ms':>8} {'bench':>8}  error")
        for row in rows:
            print(
                f"{row.near_experts:>7,} of {row.experts:>7,}  {row.ram_bytes / 2**20:8,.0f}  "
                f"{row.predicted_in_ram:6.1%} {row.measured_in_ram:6.1%}  "
                f"{row.predicted_ms:8.1f} {row.measured_ms:8.1f}  {row.error:+.0%}"
            )
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


if __name__ == "__main__":
    main()
