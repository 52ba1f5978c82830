"""Trained parts -> a checkpoint in K2-Instruct's FP8 format: 128x128 blocks with `weight_scale_inv`.

    python export.py run ../../assets/tiny-k2 --sharpness 0.5

One file per layer, with Moonshot's names. Experts are rounded to INT4 first, as in training, so that
quantizing the FP8 checkpoint to INT4 finds the same values again. `--sharpness` scales the final norm and
with it all logits (Guo et al. 2017), which makes probabilities less confident and leaves greedy answers as
they are.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from quant import KEPT, round_int4, to_fp8
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PART_BYTES = 15 << 20


def save_parts(model: nn.Module, folder: Path) -> None:
    """All weights in bf16 (correction biases in float32), in files of at most 15 MiB."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in model.state_dict().items():
        weight = tensor.cpu() if name.endswith("bias") else tensor.bfloat16().cpu()
        used = sum(other.nbytes for other in parts[-1].values())
        if used + weight.nbytes > PART_BYTES:
            parts.append({})
        parts[-1][name] = weight.contiguous()
    for n, part in enumerate(parts):
        save_file(part, folder / f"part-{n}.safetensors")


def load_parts(folder: Path) -> dict[str, Tensor]:
    """What `save_parts` wrote."""
    return {name: weight for part in sorted(folder.glob("part-*.safetensors"))
            for name, weight in load_file(part).items()}  # fmt: skip


def published(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a K2-Instruct checkpoint that one tensor of the training model becomes."""
    if ".experts." in name:
        for expert, matrix in enumerate(round_int4(weight)):
            yield from _fp8(name.replace(".experts.", f".experts.{expert}.") + ".weight", matrix)
    elif weight.dim() == 2 and not any(part in name for part in KEPT):
        yield from _fp8(name, weight)
    else:
        yield name, weight if name.endswith("bias") else weight.bfloat16()


def _fp8(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    values, scale = to_fp8(weight)
    yield name, values
    yield f"{name}_scale_inv", scale


def write(weights: dict[str, Tensor], folder: Path, layers: int) -> None:
    """Shards `model-1-of-N.safetensors` and their index, beside config, tokenizer and template."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    for name, weight in weights.items():
        parts = name.split(".")
        shard = int(parts[2]) if parts[1] == "layers" else 0 if "embed" in name else layers - 1
        shards[shard].update(published(name, weight))
    weight_map: dict[str, str] = {}
    for n, shard in enumerate(shards, 1):
        file = f"model-{n}-of-{layers}.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder that train.py wrote")
    parser.add_argument("folder", type=Path, help="holds config.json; gets the weights")
    parser.add_argument("--sharpness", type=float, default=1.0)
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    weights = load_parts(args.source)
    weights["model.norm.weight"] *= args.sharpness
    write(weights, args.folder, config["num_hidden_layers"])


if __name__ == "__main__":
    main()
