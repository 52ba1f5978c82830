"""A benchmark's report for the terminal: the figures first, then the arithmetic behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebox.console import print_line, table_of, widen
from moebox.instruments.bench.decode_report import DecodeReport
from moebox.instruments.bench.prefill_report import PrefillReport
from moebox.instruments.bench.report import BenchReport
from moebox.instruments.bench.roads import RoadFigures
from moebox.offload.machine.floor import Ceilings
from moebox.offload.prefetch.prefetch import PrefetchReport
from moebox.units import GIGA

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 140
"""Columns that the widest table takes."""


def render_bench(report: BenchReport, console: Console) -> None:
    """Print all of `report`."""
    widen(console, TABLE_WIDTH)
    machine = report.machine
    processors = f"{machine['cpu']}, {machine['threads']} threads"
    print_line(console, f"{report.model.name} on {machine.get('gpu', 'the CPU alone')}; {processors}")
    for line in (*report.plan, _routing(report)):
        print_line(console, f"  {line}", "dim")
    print_line(console, _ceilings(report.ceilings))
    for prompt in report.prefill:
        _prefill(prompt, report, console)
    if report.decode is not None:
        _decode(report.decode, report, console)
    if report.prefetch is not None:
        print_line(console, _prefetch(report.prefetch))
    for note in report.notes:
        print_line(console, f"note: {note}", "dim")


def _routing(report: BenchReport) -> str:
    routing = report.routing
    if "repeat_share" not in routing:
        return f"routing: {routing['source']}"
    share = f"{routing['repeat_share']:.1%} of a token's picks repeat at the next"
    return f"routing: {routing['source']}, {share}"


def _ceilings(ceilings: Ceilings) -> str:
    parts = [f"RAM read {ceilings.ram_gbps:.1f}"]
    if ceilings.has_gpu:
        parts += [
            f"upload {ceilings.pcie_gbps:.1f}",
            f"both at once {ceilings.ram_beside_gbps:.1f} + {ceilings.pcie_beside_gbps:.1f}",
            f"HBM read {ceilings.hbm_gbps:,.0f}, copy {ceilings.hbm_copy_gbps:,.0f}",
        ]
    if ceilings.nvme_gbps:
        parts.append(f"drives {ceilings.nvme_gbps:.2f}")
    rates = f"experts on the CPU {ceilings.cpu_tflops:.2f} TFLOP/s"
    if ceilings.has_gpu:
        rates += f", bf16 products on the GPU {ceilings.gpu_tflops:,.0f}"
    return f"measured: {', '.join(parts)} GB/s; {rates}"


def _prefill(prompt: PrefillReport, report: BenchReport, console: Console) -> None:
    full, here = report.model.full_moe_layers, report.model.moe_layers
    in_layers = sum(layer.seconds for layer in prompt.layers)
    print_line(
        console,
        f"\nprompt of {prompt.tokens:,} tokens: {prompt.tokens_per_s:,.1f} tok/s, {prompt.seconds:.3f} s "
        f"(median of {prompt.runs}), MoE layers {prompt.times_floor:.2f} times their floor",
        "bold",
    )
    if prompt.spent is not None:
        print_line(console, f"  cost: {prompt.spent}")
    if full != here:
        print_line(
            console,
            f"  at {full} MoE layers: {prompt.seconds - in_layers:.3f} s + {full}/{here} x {in_layers:.3f} s "
            f"= {prompt.full_depth_s:.3f} s, {prompt.tokens / prompt.full_depth_s:,.1f} tok/s",
        )
    table = table_of("layer", "ms", "floor ms", "times", "hits", "uploads", "CPU", "disk", *_ROADS, texts=())
    for layer in prompt.layers:
        table.add_row(
            str(layer.layer),
            _ms(layer.seconds, ".2"),
            _ms(layer.floor.seconds, ".2"),
            f"{layer.times_floor:.2f}",
            str(layer.hits),
            str(layer.uploads),
            str(layer.cpu),
            str(layer.cold),
            *_road_cells(layer.roads),
        )
    console.print(table)


def _decode(decode: DecodeReport, report: BenchReport, console: Console) -> None:
    print_line(
        console,
        f"\ndecode of {decode.tokens} tokens behind {decode.cached_tokens:,}: "
        f"{decode.tokens_per_s:.2f} tok/s, {_ms(decode.token_s)} ms a token (median "
        f"{_ms(decode.token_p50_s)}, 95 % within {_ms(decode.token_p95_s)}), "
        f"{decode.of_floor:.2f} of the floor",
        "bold",
    )
    if decode.spent is not None:
        print_line(console, f"  cost: {decode.spent}")
    print_line(console, f"  floor: {_floor(decode, report.ceilings)}")
    print_line(console, f"  experts: {_experts(decode)}")
    print_line(
        console,
        f"  host on the critical path: {_mean_schedule_us(decode):.1f} us a layer, 95 % within "
        f"{decode.schedule_p95_s * 1e6:.1f} us",
    )
    _full_depth(decode, report, console)
    experts = ("hits", "uploads", "part", "CPU", "disk")
    table = table_of("layer", "ms", "floor ms", "of floor", *experts, "wait ms", *_ROADS, texts=())
    for layer in decode.layers:
        table.add_row(
            str(layer.layer),
            _ms(layer.seconds),
            _ms(layer.floor_s),
            f"{layer.of_floor:.2f}",
            f"{layer.hits:.2f}",
            f"{layer.uploads:.2f}",
            f"{layer.part:.2f}",
            f"{layer.cpu:.2f}",
            f"{layer.cold:.2f}",
            _ms(layer.wait_s),
            *_road_cells(layer.roads),
        )
    console.print(table)


def _floor(decode: DecodeReport, ceilings: Ceilings) -> str:
    floor, roads = decode.floor, decode.roads
    misses = roads.upload_bytes + roads.cpu_bytes + roads.read_bytes
    rate = f"{ceilings.ram_gbps:.1f}"
    if ceilings.has_gpu:
        rate = f"({rate} + {ceilings.pcie_gbps:.1f})"
    text = (
        f"backbone {_ms(floor.backbone_s)} + hits {_ms(floor.hits_s)} + misses "
        f"{misses / GIGA:.3f} GB / {rate} GB/s = {_ms(floor.misses_s)}; "
    )
    if floor.nvme_s:
        text += (
            f"disk {roads.read_bytes / GIGA:.3f} GB / {ceilings.nvme_gbps:.2f} GB/s = {_ms(floor.nvme_s)}; "
        )
    text += f"in all {_ms(floor.seconds)} ms"
    if floor.together_s != floor.seconds:
        text += f" ({_ms(floor.together_s)} ms with both roads measured at the same time)"
    return text


def _experts(decode: DecodeReport) -> str:
    roads = decode.roads
    text = f"{decode.hit_rate:.1%} hits; a token's hits {roads.hit_bytes / GIGA:.3f} GB"
    if roads.read_bytes:
        text = f"{decode.in_memory:.1%} in memory, {text}"
    for name, nbytes, gbps, share in (
        ("uploads", roads.upload_bytes, roads.upload_gbps, roads.upload_of_ceiling),
        ("CPU", roads.cpu_bytes, roads.cpu_gbps, roads.cpu_of_ceiling),
        ("disk", roads.read_bytes, roads.read_gbps, roads.read_of_ceiling),
    ):
        text += f", {name} {nbytes / GIGA:.3f} GB"
        if gbps is not None:
            text += f" at {gbps:.2f} GB/s" + (f" ({share:.0%} of the ceiling)" if share is not None else "")
    return text


def _prefetch(report: PrefetchReport) -> str:
    text = (
        f"prefetch: {report.issued} reads ahead, {report.used} used, {report.late} late, {report.wrong} wrong"
    )
    text += f" ({report.wasted_bytes / GIGA:.3f} GB for nothing)"
    recall = ", ".join(f"{share:.1%} at {n}" for n, share in report.recall.items() if share is not None)
    if recall:
        text += f"; recall by layers ahead: {recall}"
    return f"{text}; off: {report.why_off}" if report.why_off else text


def _mean_schedule_us(decode: DecodeReport) -> float:
    return sum(layer.schedule_s for layer in decode.layers) / len(decode.layers) * 1e6


def _full_depth(decode: DecodeReport, report: BenchReport, console: Console) -> None:
    full = decode.full_depth
    if full.moe_layers == report.model.moe_layers:
        return
    print_line(
        console,
        f"  at {full.moe_layers} MoE layers: {_ms(full.fixed_s)} ms + {full.moe_layers} x "
        f"{_ms(full.layer_s)} ms = {_ms(full.token_s, '.2')} ms, {full.tokens_per_s:.2f} tok/s; "
        f"floor {_ms(full.floor_s, '.2')} ms, {full.of_floor:.2f} of it",
        "bold",
    )
    if decode.spent_at_full_depth is not None:
        print_line(console, f"  cost at the same watts: {decode.spent_at_full_depth}")


def _ms(seconds: float, digits: str = ".3") -> str:
    return f"{seconds * 1e3:{digits}f}"


_ROADS = ("upload MB", "GB/s", "CPU MB", "GB/s", "disk MB", "GB/s")


def _road_cells(roads: RoadFigures) -> tuple[str, ...]:
    return (
        f"{roads.upload_bytes / 1e6:,.1f}",
        _rate(roads.upload_gbps),
        f"{roads.cpu_bytes / 1e6:,.1f}",
        _rate(roads.cpu_gbps),
        f"{roads.read_bytes / 1e6:,.1f}",
        _rate(roads.read_gbps),
    )


def _rate(gbps: float | None) -> str:
    return "-" if gbps is None else f"{gbps:.1f}"
