"""Progress reports of a conversion, and how they are shown."""

import io

from rich.console import Console

from helpers.convert import SHARD_BYTES, make_source
from moebox.quantize.convert import quantize
from moebox.quantize.progress import ProgressDisplay, ProgressReport
from moebox.quantize.text import format_seconds


def report(done: int, elapsed_s: float, shard: int = 1) -> ProgressReport:
    return ProgressReport("quantize", done, 10_000_000_000, 1_000_000_000, elapsed_s, shard, 4)


def test_rate_and_time_left_ignore_what_an_earlier_run_did():
    moment = report(3_000_000_000, 4.0)
    assert moment.gbps == 0.5
    assert moment.eta_s == 14.0
    assert moment.line() == "quantize 30 % · 3.00 GB of 10.00 GB · 0.50 GB/s · shard 1/4 · 0:14 left"
    assert report(1_000_000_000, 4.0).eta_s is None


def test_seconds():
    assert [format_seconds(s) for s in (7.4, 750, 11_100)] == ["0:07", "12:30", "3:05:00"]


def test_plain_lines_are_few():
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    with ProgressDisplay(console, interval_s=5) as show:
        for tenth in range(200):
            show(report(1_000_000_000 + tenth * 1_000_000, tenth / 10))
        show(report(10_000_000_000, 20, shard=4))
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[-1].startswith("quantize 100 %")
    assert "\x1b" not in console.file.getvalue()


def test_terminal_gets_a_bar_that_is_removed():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    with ProgressDisplay(console) as show:
        show(report(5_000_000_000, 4.0))
    assert "quantize 50 %" in console.file.getvalue()
    assert "GB/s" in console.file.getvalue()


def test_reports_of_a_conversion_add_up(tmp_path):
    source, reports = make_source(tmp_path / "fp8"), []
    quantize(source, tmp_path / "out", shard_bytes=SHARD_BYTES, progress=reports.append)
    last = reports[-1]
    assert last.done_bytes == last.total_bytes > 1_000_000
    assert last.shard == last.shards == 18
    assert [r.done_bytes for r in reports] == sorted(r.done_bytes for r in reports)
    assert last.stage == "quantize"
    assert last.eta_s == 0
