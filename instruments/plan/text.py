"""A plan for the terminal: the answer first, then the arithmetic behind it, then what would change it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from moebox.config import ModelConfig
from moebox.console import print_line, table_of, widen
from moebox.instruments.plan.placement import DISK, GPU, RAM, MemoryPlacement
from moebox.instruments.plan.report import Plan
from moebox.instruments.plan.speed import DecodePrediction
from moebox.units import GIGA, gib

if TYPE_CHECKING:
    from rich.console import Console

LEAST_GAIN = 0.02
"""Smaller gains are shown as no difference: predictions are not so exact."""


def render_plan(plan: Plan, console: Console) -> None:
    """Print all of `plan`."""
    widen(console)
    print_line(console, f"{plan.model.name} on {plan.box.name}", "bold")
    if plan.model.note:
        print_line(console, f"  {plan.model.note}", "dim")
    console.print(_answer(plan))
    print_line(console, "what goes where", "bold")
    console.print(_placement(plan))
    _hits(plan, console)
    for decode in plan.decode:
        _decode(plan, decode, console)
    layers = len(plan.model.config.moe_layers)
    parts = f"prefill; moving experts, computing and disk are those of one of {layers} layers"
    print_line(console, parts, "bold")
    console.print(_prefill(plan))
    print_line(console, f"loading: {_seconds(plan.loading.seconds)}", "bold")
    console.print(_loading(plan))
    if plan.changes:
        print_line(console, "what would help most", "bold")
        console.print(_changes(plan))
    print_line(console, "where the figures are from", "bold")
    for source in plan.box.sources:
        print_line(console, f"  {source}", "dim")


def plan_line(placement: MemoryPlacement, config: ModelConfig, tokens_per_s: float | None = None) -> str:
    """A memory plan in one line, for `run` and `chat`; with its speed where that can be predicted."""
    size = config.expert_bytes
    parts = [f"backbone {gib(placement.backbone_bytes)}"]
    if placement.gpu_experts:
        parts.append(f"{placement.gpu_experts:,} experts ({gib(placement.gpu_experts * size)}) on the GPU")
    warm = sum(part.experts for part in placement.parts if part.place == RAM)
    parts.append(f"{warm:,} of {placement.keys:,} experts ({gib(warm * size)}) in RAM")
    if placement.disk_experts:
        parts.append(f"{placement.disk_experts:,} on disk only")
    parts.append(f"context {placement.context:,}")
    speed = "" if tokens_per_s is None else f"; about {_rate(tokens_per_s)} tok/s"
    return f"plan: {', '.join(parts)}{speed}"


def _answer(plan: Plan) -> Table:
    """Tokens a second, and the time until the first prompt."""
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


def _placement(plan: Plan) -> Table:
    table = table_of("where", "what", "bytes", "", "experts", texts=(0, 1))
    rooms = {
        GPU: plan.box.vram_room,
        RAM: plan.box.free_ram if plan.box.ram is None else plan.box.ram,
    }
    for place in (GPU, RAM, DISK):
        parts = [part for part in plan.placement.parts if part.place == place]
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
    shares, config = plan.pick_shares, plan.model.config
    layers, _, top_k = config.routing_shape
    picks = layers * top_k
    places = {"on the GPU": shares.gpu, "in RAM": shares.ram, "on disk": shares.disk}
    found = ", ".join(f"{share:.1%} {where}" for where, share in places.items() if share > 0)
    print_line(console, f"a token picks {picks:,} experts of {config.expert_bytes:,} bytes: {found}", "bold")
    print_line(console, f"  {plan.hits_from}", "dim")


def _decode(plan: Plan, decode: DecodePrediction, console: Console) -> None:
    print_line(
        console,
        f"\ndecode behind {decode.cached_tokens:,} tokens of context: {_ms(decode.seconds)} ms a token = "
        f"{_rate(decode.tokens_per_s)} tok/s",
        "bold",
    )
    console.print(_token(plan, decode))


def _token(plan: Plan, decode: DecodePrediction) -> Table:
    """For each part of a token: its bytes over the bandwidth are its floor; floor over the reached share is
    the expected time."""
    unit, scale = ("GB", GIGA) if decode.moved.backbone >= GIGA else ("MB", 1e6)
    table = table_of("", unit, "GB/s", "floor ms", "reached", "expected ms")
    for name, nbytes, gbps, floor_s, reached, seconds in _token_parts(plan, decode):
        if nbytes:
            cells = (f"{nbytes / scale:.2f}", gbps, _ms(floor_s), f"{reached:.0%}", _ms(seconds))
            table.add_row(name, *cells)
    layers = len(plan.model.config.moe_layers)
    table.add_row(f"{layers} layers, whatever their bytes", "", "", "", "", _ms(decode.overhead_s))
    table.add_row("* experts, all roads at the same time", "", "", "", "", _ms(decode.experts_s))
    of_floor = f"{decode.of_floor:.0%}"
    table.add_row("together", "", "", _ms(decode.floor.seconds), of_floor, _ms(decode.seconds), style="bold")
    return table


def _token_parts(
    plan: Plan, decode: DecodePrediction
) -> tuple[tuple[str, float, str, float, float, float], ...]:
    """(name, bytes, GB/s, floor in seconds, reached share, expected seconds) of each part of a token."""
    ceilings, reached, floor = plan.box.ceilings, plan.box.efficiency, decode.floor
    moved, roads, fast = decode.moved, decode.layer_roads, f"{ceilings.fast_gbps:,.0f}"
    backbone_s = moved.backbone / (ceilings.fast_gbps * GIGA)
    cache_s = floor.backbone_s - backbone_s
    if ceilings.has_gpu:
        ram, ram_reached = "experts in RAM, by CPU and over PCIe*", reached.roads
        ram_gbps = f"{ceilings.ram_gbps:.0f} + {ceilings.pcie_gbps:.0f}"
    else:
        ram, ram_reached, ram_gbps = "experts, by the CPU*", reached.experts, fast
    disk = f"{ceilings.nvme_gbps:g}"
    return (
        ("backbone", moved.backbone, fast, backbone_s, reached.backbone, decode.backbone_s),
        ("cache", decode.cache_bytes, fast, cache_s, reached.attention, decode.attention_s),
        ("experts on the GPU*", moved.hits, fast, floor.hits_s, reached.experts, roads["gpu"]),
        (ram, moved.ram_misses, ram_gbps, floor.misses_s, ram_reached, roads["ram"]),
        ("experts read from the disk*", moved.nvme_misses, disk, floor.nvme_s, reached.nvme, roads["disk"]),
    )


def _prefill(plan: Plan) -> Table:
    """A layer's floor is the longest of its parts; without a GPU it is moving plus computing, or disk."""
    columns = ("tokens", "moving ms", "computing ms", "disk ms", "floor s", "reached", "expected s", "tok/s")
    table = table_of(*columns, texts=())
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
    table = table_of("", "GB", "GB/s", "s")
    for what, nbytes, gbps in plan.loading.stages:
        table.add_row(what, f"{nbytes / GIGA:,.3f}", f"{gbps:.2f}", f"{nbytes / (gbps * GIGA):,.1f}")
    return table


def _changes(plan: Plan) -> Table:
    table = table_of("", "tok/s", "", texts=(0, 2))
    table.add_row("as it is", _rate(plan.tokens_per_s), "")
    for change in plan.changes:
        gain = f"{change.gain:+.0%}" if change.gain < 1 else f"{1 + change.gain:.1f} times as fast"
        gain = gain if abs(change.gain) >= LEAST_GAIN else "no difference"
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
