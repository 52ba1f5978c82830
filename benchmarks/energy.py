"""Compares the joules that overlapping requests are given with NVML's counter, which another process reads.

    python benchmarks/energy.py --seconds 60

A request is a series of bursts of bf16 products with pauses between them. In each round one, two, three or
four requests overlap, or six short ones follow one another; between rounds no request is open. A second
process, which does not know the requests, records every step of the counter.

A row of the table holds, for each round, the joules that its requests were given, the counter's difference
from the begin of the first to the end of the last request (linear between steps), and the difference of the
two in percent. The last row holds the same for the whole run, requests and idle time together. Then follow
the times that `begin` and `end` take. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import bisect
import json
import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from moebox.cost.energy.gpu_energy import open_gpu
from moebox.cost.energy.meter import EnergyMeter
from moebox.cost.usage import Joules

SIZE = 8192
BURST_S = 0.05
TOKENS = 16
"""Tokens that a burst counts."""
REQUEST_S = 3.0
SHORT_S = 0.15
PAUSE_S = 0.7
"""Time between rounds."""
POLL_S = 0.002
TAIL_S = 0.4
"""Time recorded after the last request, since the counter's last step comes late."""


@dataclass(frozen=True)
class Trace:
    """The counter's steps: the time of each, on the clock that all processes share, and its joules."""

    at: Sequence[float]
    joules: Sequence[float]

    def until(self, at: float) -> float:
        """Joules drawn until `at`, linear between two steps."""
        right = min(max(bisect.bisect_left(self.at, at), 1), len(self.at) - 1)
        left = right - 1
        part = (at - self.at[left]) / (self.at[right] - self.at[left])
        return self.joules[left] + part * (self.joules[right] - self.joules[left])

    def between(self, begin: float, end: float) -> float:
        """Joules drawn from `begin` to `end`."""
        return self.until(end) - self.until(begin)


def watch(uuid: str, pipe: Connection) -> None:
    """The second process: record each step of the counter until `pipe` receives anything."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    steps: list[tuple[float, int]] = []
    pipe.send("ready")
    while not pipe.poll(POLL_S):
        counter = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        if not steps or counter != steps[-1][1]:
            steps.append((time.monotonic(), counter))
    pipe.send(steps)


class Watch:
    """Runs `watch` in another process."""

    def __init__(self, uuid: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=watch, args=(uuid, theirs), daemon=True)
        self._process.start()
        self._pipe.recv()

    def stop(self) -> Trace:
        """End the process; the steps that it recorded."""
        self._pipe.send("stop")
        steps = self._pipe.recv()
        self._process.join()
        return Trace([at for at, _ in steps], [counter / 1e3 for _, counter in steps])


@dataclass
class Served:
    """One request: its begin and end, its joules, and the time that `begin` and `end` took."""

    begun_s: float
    ended_s: float
    joules: float
    begin_us: float
    end_us: float


@dataclass
class Round:
    """Requests that overlap, or short ones that follow one another."""

    what: str
    served: list[Served] = field(default_factory=list)

    def compare(self, trace: Trace) -> dict[str, Any]:
        """The requests' joules compared with the counter's."""
        begun, ended = min(r.begun_s for r in self.served), max(r.ended_s for r in self.served)
        given = sum(request.joules for request in self.served)
        if self.what == "short":
            counted = sum(trace.between(r.begun_s, r.ended_s) for r in self.served)
        else:
            counted = trace.between(begun, ended)
        return row(self.what, len(self.served), ended - begun, given, counted)


def row(what: str, requests: int, seconds: float, given: float, counted: float) -> dict[str, Any]:
    """One line of the table."""
    difference = 100 * (given / counted - 1)
    figures = {
        "seconds": seconds,
        "joules": given,
        "outside_joules": counted,
        "difference_percent": difference,
    }
    return {"what": what, "requests": requests, **figures}


def burst(seconds: float) -> None:
    """Compute products for `seconds`, on a new stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        a = torch.ones(SIZE, SIZE, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(a)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            torch.mm(a, a, out=out)
            stream.synchronize()


def serve(meter: EnergyMeter, work: Callable[[float], None], seconds: float, seed: int) -> Served:
    """One request: bursts of work with pauses; each burst counts `TOKENS` tokens."""
    chance = random.Random(seed)
    called = time.monotonic()
    span = meter.begin()
    begun = time.monotonic()
    while time.monotonic() < begun + seconds:
        work(min(seconds, BURST_S * chance.uniform(0.5, 1.5)))
        span.tokens(TOKENS)
        time.sleep(min(seconds / 4, chance.uniform(0, BURST_S)))
    ended = time.monotonic()
    given = gpu_joules(span.end())
    return Served(begun, ended, given, 1e6 * (begun - called), 1e6 * (time.monotonic() - ended))


def gpu_joules(energy: Sequence[Joules]) -> float:
    """The GPU's part."""
    return sum(part.joules for part in energy if part.source == "gpu")


def serve_round(meter: EnergyMeter, work: Callable[[float], None], number: int) -> Round:
    """One to four overlapping requests, then short ones, by the number of the round."""
    overlapping = number % 5 + 1
    if overlapping == 5:
        short = Round("short")
        for turn in range(6):
            short.served.append(serve(meter, work, SHORT_S, number + turn))
            time.sleep(PAUSE_S / 2)
        return short
    done = Round(f"{overlapping} at once")

    def client(turn: int) -> None:
        time.sleep(turn * REQUEST_S / 8)
        done.served.append(serve(meter, work, REQUEST_S * (1 - turn / 8), 100 * number + turn))

    threads = [threading.Thread(target=client, args=(turn,)) for turn in range(overlapping)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done


def run(
    meter: EnergyMeter, work: Callable[[float], None], seconds: float
) -> tuple[list[Round], float, float, float]:
    """Serve rounds for `seconds`: the rounds, begin and end of the run, and all joules, idle ones too."""
    began = time.monotonic()
    meter.idle()
    before = gpu_joules(meter.measured())
    rounds: list[Round] = []
    while time.monotonic() < began + seconds:
        rounds.append(serve_round(meter, work, len(rounds)))
        time.sleep(PAUSE_S)
    idle = sum(gpu_joules(spell.energy) for spell in meter.idle())
    ended = time.monotonic()
    given = idle + sum(request.joules for done in rounds for request in done.served)
    measured = gpu_joules(meter.measured()) - before
    if abs(given - measured) > 1e-6 * measured:
        raise SystemExit(f"requests and idle time sum to {given} J, but {measured} J were measured")
    return rounds, began, ended, given


def report(rounds: list[Round], total: dict[str, Any], trace: Trace, name: str) -> dict[str, Any]:
    """Print the table; returns the figures for JSON."""
    rows = [done.compare(trace) for done in rounds]
    print(f"{name}: the counter stepped every {statistics.median(steps_ms(trace)):.0f} ms (median)\n")
    print("round          requests  seconds    J given  J counted  difference")
    for line in [*rows, total]:
        print(
            f"{line['what']:14} {line['requests']:8} {line['seconds']:8.2f} {line['joules']:10.1f} "
            f"{line['outside_joules']:10.1f} {line['difference_percent']:+10.2f} %"
        )
    served = [request for done in rounds for request in done.served]
    costs = {
        "begin_us": statistics.median(request.begin_us for request in served),
        "end_us": statistics.median(request.end_us for request in served),
    }
    print(f"\nbegin {costs['begin_us']:.0f} us, end {costs['end_us']:.0f} us (medians)")
    long = [line for line in rows if line["what"] != "short"]
    worst = max((line["difference_percent"] for line in long), key=abs, default=0.0)
    return {"gpu": name, **total, "worst_round_percent": worst, **costs, "rounds": rows}


def steps_ms(trace: Trace) -> list[float]:
    """Milliseconds from each step of the counter to the next."""
    return [1e3 * (after - before) for before, after in zip(trace.at, trace.at[1:], strict=False)]


def main() -> int:
    """Measure, print a table, then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device: there is none", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = open_gpu(device)
    if gpu is None:
        print("this benchmark needs NVML's energy counter: this GPU has none", file=sys.stderr)
        return 1
    properties = torch.cuda.get_device_properties(device)
    burst(1.0)
    outside = Watch(f"GPU-{properties.uuid}")
    time.sleep(TAIL_S)
    meter = EnergyMeter([gpu])
    rounds, began, ended, given = run(meter, burst, options.seconds)
    time.sleep(TAIL_S)
    trace = outside.stop()
    requests = sum(len(done.served) for done in rounds)
    total = row("all, and idle", requests, ended - began, given, trace.between(began, ended))
    print(json.dumps(report(rounds, total, trace, properties.name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
