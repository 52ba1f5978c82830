"""Options of `moebox bench`; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebox.option_fields import option, same_option
from moebox.runtime.engine.options import LoadOptions

if TYPE_CHECKING:
    from moebox.quantize.synth import Shape


@dataclass(frozen=True)
class BenchOptions:
    """What `moebox bench` is asked.

    Attributes:
        model: a checkpoint's folder; None: `shape` is given instead.
        shape: "kimi-k2" or "tiny": random weights of these dimensions.
        layers: depth of the random model, dense layers included; None: the shape's own.
        device: "cpu", "cuda", "cuda:N"; None: a GPU if there is one.
        vram, ram: budgets in bytes, of the whole model however shallow the run; None: what is free.
        context: tokens that the budget's cache holds; None: what the plan gives.
        prompt_tokens: lengths to measure.
        decode_tokens: tokens to measure after the last prompt; 0: none.
        routing: "synthetic", "model" or a trace's path; None: "model" for a checkpoint, else "synthetic".
        threads: cores for the experts; None: all, or all but one beside a GPU.
        stores: more folders with the checkpoint's shards.
        prefetch: let idle drives read what the next layers are likely to need.
    """

    model: Path | None = None
    shape: Shape | None = field(
        default=None,
        metadata=option("choice", "Random weights of this shape instead.", choices=("kimi-k2", "tiny")),
    )
    layers: int | None = field(
        default=None, metadata=option("number", "Depth of the random model, dense layers included.")
    )
    device: str | None = field(default=None, metadata=same_option(LoadOptions, "device"))
    vram: int | None = field(
        default=None,
        metadata=option(
            "bytes",
            "GPU memory for the whole model; fewer --layers get their share. 0: no experts on the GPU.  "
            "[default: what is free]",
        ),
    )
    ram: int | None = field(
        default=None,
        metadata=option(
            "bytes",
            "Memory for the whole model, likewise; MODEL's experts beyond it are read from disk.  "
            "[default: all of them]",
        ),
    )
    context: int | None = field(
        default=None, metadata=option("number", "Tokens of cache in --vram.  [default: a part of it]")
    )
    prompt_tokens: tuple[int, ...] = field(
        default=(512, 4096), metadata=option("lengths", "Prompts to measure; empty: none.")
    )
    decode_tokens: int = field(
        default=128, metadata=option("number", "Tokens after the last prompt.", least=0)
    )
    routing: str | None = field(
        default=None,
        metadata=option(
            "text",
            "synthetic: a trace with published locality; model: the router's picks; or a trace's file.  "
            "[default: model for MODEL, else synthetic]",
        ),
    )
    threads: int | None = field(
        default=None, metadata=option("number", "Cores to use.  [default: all, less one for a GPU]")
    )
    stores: tuple[Path, ...] = field(default=(), metadata=same_option(LoadOptions, "stores"))
    prefetch: bool = field(default=True, metadata=same_option(LoadOptions, "prefetch"))

    def load_options(self, **others: Any) -> LoadOptions:
        """Options of loading the checkpoint: the fields that both classes have, replaced by `others`."""
        shared = {item.name for item in fields(self)} & {item.name for item in fields(LoadOptions)}
        return LoadOptions(**{name: getattr(self, name) for name in shared} | others)
