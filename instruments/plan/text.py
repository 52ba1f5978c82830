"""A plan for the terminal: the answer first, then how it comes about, then what would change it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box as boxes
from rich.table import Table
from rich.text import Text

from moebox.config import ModelConfig
from moebox.instruments.plan.placement import DISK, GPU, RAM, Places
from moebox.instruments.plan.report import Plan
from moebox.instruments.plan.speed import DecodePrediction
from moebox.units import GIGA, gib

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 110
"""Columns printed even where the terminal is narrower, or none: cells that are cut off say nothing."""
NO_CHANGE = 0.02
"""Gains of less are called nothing: they are below what a prediction can tell."""


def render_plan(plan: Plan, console: Console) -> None:
    """Print all of `plan`."""
    console.width = max(console.width, TABLE_WIDTH)
    _line(console, f"{plan.subject.name} on {plan.box.name}", "bold")
    if plan.subject.note:
        _line(console, f"  {plan.subject.note}", "dim")
    console.print(_answer(plan))
    _line(console, "what goes where", "bold")
    console.print(_places(plan))
    _hits(plan, console)
    for decode in plan.decode:
        _decode(plan, decode, console)
    layers = len(plan.subject.config.moe_layers)
    _line(console, f"prefill; moving experts, computing and disk are those of one of {layers} layers", "bold")
    console.print(_prefill(plan))
    _line(console, f"loading: {_seconds(plan.loading.seconds)}", "bold")
    console.print(_loading(plan))
    if plan.changes:
        _line(console, "what would help most", "bold")
        console.print(_changes(plan))
    _line(console, "where the figures are from", "bold")
    for source in plan.box.sources:
        _line(console, f"  {source}", "dim")


def plan_line(places: Places, config: ModelConfig, tokens_per_s: float | None = None) -> str:
    """A memory plan in one line, for `run` and `chat`; with its speed where that can be foretold."""
    size = config.expert_bytes
    parts = [f"backbone {gib(places.backbone_bytes)}"]
    if places.gpu_experts:
        parts.append(f"{places.gpu_experts:,} experts ({gib(places.gpu_experts * size)}) on the GPU")
    warm = sum(part.experts for part in places.parts if part.place == RAM)
    parts.append(f"{warm:,} of {places.keys:,} experts ({gib(warm * size)}) in RAM")
    if places.disk_experts:
        parts.append(f"{places.disk_experts:,} on disk only")
    parts.append(f"context {places.context:,}")
    speed = "" if tokens_per_s is None else f"; about {_rate(tokens_per_s)} tok/s"
    return f"plan: {', '.join(parts)}{speed}"


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=boxes.SIMPLE_HEAD, pad_edge=False)
    for name, side in columns:
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    return table


def _answer(plan: Plan) -> Table:
    """What a stranger wants to know."""
    table = Table.grid(padding=(0, 2))
    for decode in plan.decode:
        behind = f"writing behind {decode.cached_tokens:,} tokens of context"
        table.add_row("  decode", f"{_rate(decode.tokens_per_s)} tok/s", behind)
    for prefill in plan.prefill:
        text = f"reading a prompt of {prefill.tokens:,} tokens: {_seconds(prefill.seconds)}"
        table.add_row("  prefill", f"{_rate(prefill.tokens_per_s)} tok/s", text)
    table.add_row("  loading", _seconds(plan.loading.seconds), "until the first prompt can begin")
    table.add_row("")
    return table


def _places(plan: Plan) -> Table:
    table = _table(("where", ""), ("what", ""), ("bytes", "right"), ("", "right"), ("experts", "right"))
    rooms = {
        GPU: plan.box.free_vram if plan.box.vram is None else plan.box.vram,
        RAM: plan.box.free_ram if plan.box.ram is None else plan.box.ram,
    }
    for place in (GPU, RAM, DISK):
        parts = [part for part in plan.places.parts if part.place == place]
        for number, part in enumerate(parts):
            experts = f"{part.experts:,}" if part.experts else ""
            name = "" if number else place
            table.add_row(name, part.what, f"{part.nbytes:,}", gib(part.nbytes), experts)
        if parts and place in rooms:
            left = rooms[place] - sum(part.nbytes for part in parts)
            what = "left to the system and free" if place == RAM else "left"
            table.add_row("", what, f"{left:,}", gib(left), "", style="dim")
    return table


def _hits(plan: Plan, console: Console) -> None:
    chances, config = plan.chances, plan.subject.config
    picks = len(config.moe_layers) * config.num_experts_per_tok
    places = {"on the GPU": chances.gpu, "in RAM": chances.ram, "on disk": chances.disk}
    found = ", ".join(f"{share:.1%} {where}" for where, share in places.items() if share > 0)
    _line(console, f"a token picks {picks:,} experts of {config.expert_bytes:,} bytes: {found}", "bold")
    _line(console, f"  {plan.hits_from}", "dim")


def _decode(plan: Plan, decode: DecodePrediction, console: Console) -> None:
    _line(
        console,
        f"\ndecode behind {decode.cached_tokens:,} tokens of context: {_ms(decode.seconds)} ms a token = "
        f"{_rate(decode.tokens_per_s)} tok/s",
        "bold",
    )
    console.print(_token(plan, decode))


def _token(plan: Plan, decode: DecodePrediction) -> Table:
    """Each part of a token: bytes over bandwidth is the floor; what of it is reached gives what to expect."""
    ceilings, reached, floor = plan.box.ceilings, plan.box.efficiency, decode.floor
    moved, roads, fast = decode.moved, decode.layer_roads, f"{ceilings.fast_gbps:,.0f}"
    backbone_s = moved.backbone / (ceilings.fast_gbps * GIGA)
    cache_s = floor.backbone_s - backbone_s
    both = f"{ceilings.ram_gbps:.0f} + {ceilings.pcie_gbps:.0f}" if ceilings.has_gpu else fast
    ram_reached = reached.roads if ceilings.has_gpu else reached.experts
    ram = "experts in RAM, by CPU and over PCIe" if ceilings.has_gpu else "experts, by the CPU"
    disk = f"{ceilings.nvme_gbps:g}"
    rows = (
        ("backbone", moved.backbone, fast, backbone_s, reached.backbone, decode.backbone_s),
        ("cache", decode.cache_bytes, fast, cache_s, reached.attention, decode.attention_s),
        ("experts on the GPU*", moved.hits, fast, floor.hits_s, reached.experts, roads["gpu"]),
        (f"{ram}*", moved.ram_misses, both, floor.misses_s, ram_reached, roads["ram"]),
        ("experts read from the disk*", moved.nvme_misses, disk, floor.nvme_s, reached.nvme, roads["disk"]),
    )
    unit, scale = ("GB", GIGA) if moved.backbone >= GIGA else ("MB", 1e6)
    columns = (unit, "GB/s", "floor ms", "reached", "expected ms")
    table = _table(("", ""), *((name, "right") for name in columns))
    for name, nbytes, gbps, floor_s, part, seconds in rows:
        if nbytes:
            cells = (f"{nbytes / scale:.2f}", gbps, _ms(floor_s), f"{part:.0%}", _ms(seconds))
            table.add_row(name, *cells)
    layers = len(plan.subject.config.moe_layers)
    table.add_row(f"{layers} layers, whatever their bytes", "", "", "", "", _ms(decode.overhead_s))
    table.add_row("* experts, all roads at the same time", "", "", "", "", _ms(decode.experts_s))
    of_floor = f"{decode.of_floor:.0%}"
    table.add_row("together", "", "", _ms(floor.seconds), of_floor, _ms(decode.seconds), style="bold")
    return table


def _prefill(plan: Plan) -> Table:
    """A layer's floor is the longest of its parts; without a GPU the CPU moves and computes, one by one."""
    names = ("tokens", "moving ms", "computing ms", "disk ms", "floor s", "reached", "expected s", "tok/s")
    table = _table(*((name, "right") for name in names))
    for prefill in plan.prefill:
        table.add_row(
            f"{prefill.tokens:,}",
            _ms(prefill.layer_moving_s),
            _ms(prefill.layer_computing_s),
            _ms(prefill.layer_disk_s),
            f"{prefill.floor_s:.2f}",
            f"{prefill.floor_s / prefill.seconds:.0%}",
            f"{prefill.seconds:.2f}",
            _rate(prefill.tokens_per_s),
        )
    return table


def _loading(plan: Plan) -> Table:
    table = _table(("", ""), ("GB", "right"), ("GB/s", "right"), ("s", "right"))
    for what, nbytes, gbps in plan.loading.stages:
        table.add_row(what, f"{nbytes / GIGA:,.3f}", f"{gbps:.2f}", f"{nbytes / (gbps * GIGA):,.1f}")
    return table


def _changes(plan: Plan) -> Table:
    table = _table(("", ""), ("tok/s", "right"), ("", ""))
    table.add_row("as it is", _rate(plan.tokens_per_s), "")
    for change in plan.changes:
        gain = f"{change.gain:+.0%}" if change.gain < 1 else f"{1 + change.gain:.1f} times as fast"
        gain = gain if abs(change.gain) >= NO_CHANGE else "no difference"
        table.add_row(change.what, _rate(change.tokens_per_s), gain)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.2f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} minutes"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
