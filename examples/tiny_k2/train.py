"""Train tiny-k2 on dialogues.

    python train.py --data train.jsonl.xz --dev dev.jsonl.xz --out run --minutes 8

logs JSON lines and writes the weights as `run/part-N.safetensors`, which export.py turns into a
checkpoint. Everything follows one clock, `progress` from 0 to 1, so a run fits the time it is given:
the learning rate rises for 2 %, holds, and falls from 45 % on; from 87 % on the weights are rounded as
they will run (INT4 experts, FP8 for the rest); at 92 % the correction bias is frozen.
"""

import argparse
import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dialogues import LOSS_WEIGHTS
from export import save_parts
from model import Model, read_config
from muon import optimizers
from quant import quantized
from score import control_marks, score, to_device
from stream import Batch, Workers, dev_batches

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "tiny-k2"
WARM_UP, DECAY, ROUNDED, FROZEN = 0.02, 0.45, 0.87, 0.92
BIAS_STEPS = (3e-3, 1e-3)


def learning_rate(progress: float) -> float:
    """Share of the peak rate."""
    return min(progress / WARM_UP, 1.0, (1 - progress) / (1 - DECAY)) + 1e-3


def loss_of(model: Model, batch: Batch, device: str) -> torch.Tensor:
    """Cross entropy of the next token, weighted by what kind of token it is."""
    ids, kinds, documents = to_device(batch, device)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(ids, documents)
    weights = torch.tensor(LOSS_WEIGHTS, device=device)[kinds[1:]] * (documents.positions[1:] > 0)
    losses = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def balance(model: Model, step: float) -> torch.Tensor:
    """Balance the load as DeepSeek-V3 does, without a loss; return the largest load over the mean, per layer.

    `step` is added to the bias of experts with less than the mean load and taken from that of the others.
    """
    worst = []
    for layer in model.moe_layers():
        load = layer.load.float()
        worst.append(load.max() / load.mean())
        layer.gate.e_score_correction_bias += step * torch.sign(load.mean() - load)
        layer.load.zero_()
    return torch.stack(worst)


def train(model: Model, batches: Iterable[Batch], dev: list[Batch], options: argparse.Namespace) -> None:
    """Train until `options.minutes` or `options.steps` are over, whichever comes first."""
    device = next(model.parameters()).device.type
    both = optimizers(model, options.muon_lr, options.adam_lr)
    run = torch.compile(model) if options.compile else model
    marks = control_marks(options.assets)
    begin = time.monotonic()
    for step, batch in enumerate(batches):
        if step == 1:  # compilation and the workers' start do not count
            begin = time.monotonic()
        spent = (time.monotonic() - begin) / 60 / options.minutes
        progress = max(spent, step / options.steps) if step else 0.0
        if progress >= 1:
            return
        with quantized(model) if progress >= ROUNDED else nullcontext():
            loss = loss_of(run, batch, device)
            loss.backward()
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        worst = balance(model, 0.0 if progress >= FROZEN else BIAS_STEPS[progress > DECAY])
        if step % options.every == 0:
            log(step=step, progress=progress, loss=loss.item(), seconds=time.monotonic() - begin,
                load=[round(x, 1) for x in worst.tolist()])  # fmt: skip
        if step and step % (20 * options.every) == 0:
            log(step=step, **score(model, dev, marks, device))
            save_parts(model, options.out)


def log(**row: Any) -> None:
    """One JSON object on a line of its own."""
    print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--assets", type=Path, default=ASSETS, help="config, tokenizer and template")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=131_072, help="per step")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--muon-lr", type=float, default=0.03)
    parser.add_argument("--adam-lr", type=float, default=0.005)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--warm", type=int, default=12, help="batches per worker with copying exercises")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--dev-limit", type=int)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    workers = Workers(args.workers, args.data, args.assets, args.tokens, warm=args.warm)
    dev = dev_batches(args.dev, args.assets, args.tokens, args.dev_limit)
    model = Model(read_config(args.assets / "config.json", dropout=args.dropout)).to(device)
    train(model, workers, dev[: max(1, len(dev) // 8)], args)
    workers.stop()
    save_parts(model, args.out)
    marks = control_marks(args.assets)
    log(weights="as trained", **score(model, dev, marks, device))
    for name, int4 in {"fp8": False, "int4": True}.items():
        with quantized(model, int4):
            log(weights=name, **score(model, dev, marks, device))


if __name__ == "__main__":
    main()
