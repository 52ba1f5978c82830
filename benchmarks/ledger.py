"""Time that the ledger takes: handing over a request, writing it, and adding up many.

    python benchmarks/ledger.py
    python benchmarks/ledger.py --dir /nvme/tmp --rows 1000000

An answer waits for `put`, whose bar is a median below 1 ms. `commit` is the writing of one request, which
waits for the drive; `batch` is the time per request where many are written together. Sums and opening are
measured on a ledger of `--rows` made-up requests in random order of time, which is the worst case.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.writer import LedgerWriter
from moebox.cost.usage import TRAFFIC_FIELDS, Joules, RequestRecord, Traffic, Usage

BAR_MS = 1.0
PUTS = 5000
COMMITS = 200
BATCH = 10_000
DAYS = 90


def request(number: int, rng: random.Random) -> RequestRecord:
    """A request of one of 20 users, within the last `DAYS` days."""
    return RequestRecord(
        id=f"{number:032x}",
        begun_s=time.time() - rng.random() * DAYS * 86_400,
        model="Kimi-K2-Instruct-INT4",
        user=f"user-{rng.randrange(20)}",
        finish_reason="stop",
        usage=usage(rng),
    )


def usage(rng: random.Random) -> Usage:
    """Made-up figures of one request."""
    return Usage(
        prompt_tokens=rng.randrange(10, 8000),
        completion_tokens=rng.randrange(1, 2000),
        prefill_s=rng.random() * 10,
        decode_s=rng.random() * 100,
        traffic=Traffic(*(rng.randrange(10**9) for _ in TRAFFIC_FIELDS)),
        energy=(Joules("gpu", rng.random() * 1e5, "counter"), Joules("cpu", rng.random() * 1e4, "estimated")),
    )


def milliseconds(work: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    work()
    return (time.perf_counter() - begun_s) * 1e3


def measure_put(path: Path, rng: random.Random) -> dict[str, float]:
    """Milliseconds of `LedgerWriter.put` while the thread writes the requests put before."""
    writer = LedgerWriter(path)
    rows = [request(number, rng) for number in range(PUTS)]
    taken = sorted(milliseconds(lambda row=row: writer.put(row)) for row in rows)
    flush_ms = milliseconds(writer.flush)
    writer.close()
    return {
        "put_median_ms": statistics.median(taken),
        "put_p99_ms": taken[PUTS * 99 // 100],
        "put_max_ms": taken[-1],
        "flush_ms": flush_ms,
    }


def measure_ledger(path: Path, n_rows: int, rng: random.Random) -> dict[str, float]:
    """Milliseconds of a commit, of a row in a large batch, and of reading a ledger of `n_rows`."""
    with Ledger.open(path) as ledger:
        commits = [milliseconds(lambda n=n: ledger.add(request(n, rng))) for n in range(COMMITS)]
        batches = []
        for first in range(COMMITS, n_rows, BATCH):
            rows = [request(number, rng) for number in range(first, min(first + BATCH, n_rows))]
            batches.append(milliseconds(lambda rows=rows: ledger.add(*rows)) / len(rows))
    week_s = time.time() - 7 * 86_400
    with Ledger.open(path, read_only=True) as ledger:
        return {
            "commit_median_ms": statistics.median(commits),
            "batch_ms_per_row": statistics.median(batches),
            "open_ms": milliseconds(lambda: Ledger.open(path, read_only=True).close()),
            "totals_ms": milliseconds(ledger.totals),
            "totals_by_user_ms": milliseconds(lambda: ledger.totals(by="user")),
            "totals_of_a_week_ms": milliseconds(lambda: ledger.totals(week_s)),
            "rows_read_ms": milliseconds(lambda: sum(1 for _ in ledger.requests())),
            "bytes_per_row": path.stat().st_size / n_rows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="where the ledgers are written, and deleted (default: /tmp)")
    parser.add_argument("--rows", type=int, default=100_000, help="requests of the large ledger")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    options = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        figures = measure_put(Path(folder) / "put.sqlite3", rng)
        figures |= measure_ledger(Path(folder) / "large.sqlite3", max(options.rows, COMMITS + 1), rng)
    if not options.json:
        for name, value in figures.items():
            print(f"{name:22} {value:12.4f}")
        print(
            f"bar: put in less than {BAR_MS:g} ms: {'met' if figures['put_median_ms'] < BAR_MS else 'missed'}"
        )
    print(json.dumps({"rows": options.rows, **figures}))


if __name__ == "__main__":
    main()
