"""Decoding with half of the experts on a drive: compared with the drive's speed, and with other programs.

    python benchmarks/nvme.py --dir /mnt/nvme/bench
    python benchmarks/nvme.py --dir /mnt/nvme/bench --model /mnt/nvme/k2 --json

For tiny-k2 and a random K2-shaped model (both made in `--dir`, and removed) or for `--model`s:

- All experts in RAM, then with `--ram` for a share of them: every logit must be the same, bit for bit.
  Contenders take turns in each round: moebox with and without prefetching, which alternate token by token,
  accelerate's disk offload, and mapped shards. All decode the same tokens with the same kernels, attention
  and router, start with the same share of experts in memory, and may keep as many.
- Prefetching at every other token of one run: its effect if no trial switched it off.
- Reads alone: each token picks only experts that are not in RAM. GB/s, compared with as many O_DIRECT reads
  of one expert's size by plain threads; the two take turns.

Means over a turn, medians over the rounds; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from disk_baselines import AcceleratedExperts, Baseline, MappedExperts

from moebox.commands.demo import ASSETS, MODEL
from moebox.kernels import cpu
from moebox.offload.checkpoint.locate import find_experts
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.disk.store import ExpertStore
from moebox.offload.prefetch.ab_trial import Trial, fit_change
from moebox.offload.prefetch.prefetch import Prefetcher
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth
from moebox.runtime.engine.cpu_plan import budget_for_share
from moebox.runtime.engine.engine import Engine
from moebox.runtime.engine.options import LoadOptions

CONTEXT = 512
READ_WAYS = tuple(itertools.product((1, 2, 4, 8), (1 << 20, 1 << 30)))
"""Plain reads: (reads under way, bytes of each, at most an expert). The fastest way counts."""
SMALL_BACKBONE = {
    "vocab_size": 4096,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 512,
}
"""Sizes of the K2-shaped model, whose experts are what is measured. Attention of the true size would take two
cores without bf16 instructions as long as a drive takes to read several experts."""
ROAD_S = 3.0
"""Seconds of each turn of moebox's reads and of plain reads."""


@dataclass(frozen=True)
class Reference:
    """What all contenders must repeat: a prompt, the tokens after it, and their logits. `seconds` are those
    of each token with all experts in RAM."""

    prompt: list[int]
    tokens: list[int]
    logits: list[torch.Tensor]
    seconds: list[float]

    def first(self, n_tokens: int) -> Reference:
        """The same with the first tokens only."""
        return Reference(self.prompt, self.tokens[:n_tokens], self.logits[: n_tokens + 1], self.seconds)


@dataclass(frozen=True)
class Decoded:
    """A contender's turn: seconds of each token, whether all logits were right, the share of picks found in
    RAM, seconds of loading, and the share of the time that trials of prefetching have cost."""

    seconds: list[float]
    identical: bool
    hit_rate: float
    load_s: float
    trial_cost: float = 0.0


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--dir", type=Path, required=True, help="on the drive; needs room for the K2-shaped model"
    )
    parser.add_argument("--model", type=Path, action="append", help="measure these instead; may be repeated")
    parser.add_argument("--layers", type=int, default=3, help="of the K2-shaped model, one of them dense")
    parser.add_argument(
        "--experts", type=int, default=84, help="of each of its MoE layers; 2 x 84 are 4.2 GB"
    )
    parser.add_argument("--share", type=float, default=0.5, help="part of the experts that RAM holds")
    parser.add_argument("--tokens", type=int, default=128, help="moebox decodes in each turn")
    parser.add_argument("--baseline-tokens", type=int, default=6, help="of these, what the others decode")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="moebox-nvme-") as scratch:
        os.environ["XDG_DATA_HOME"] = scratch  # the user's statistics and profile stay as they are
        models = {path.name: path for path in options.model or []} or make_models(Path(scratch), options)
        figures = {}
        for name, path in models.items():
            figures[name] = measure(path, options)
            if not options.json:
                describe(name, figures[name])
    print(json.dumps(figures))


def make_models(scratch: Path, options: argparse.Namespace) -> dict[str, Path]:
    """tiny-k2 and the K2-shaped model, quantized."""
    quantize(ASSETS / MODEL, scratch / MODEL)
    source = scratch / "source"
    synth(
        source,
        "kimi-k2",
        layers=options.layers,
        experts=options.experts,
        format="int4",
        config_overrides=SMALL_BACKBONE,
        shard_bytes=500_000_000,
    )
    quantize(source, scratch / "k2-shaped", delete_source=True)
    shutil.rmtree(source)
    return {MODEL: scratch / MODEL, "k2-shaped": scratch / "k2-shaped"}


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    reference, share = decode_in_ram(path, options.tokens), options.share
    first = reference.first(options.baseline_tokens)
    turns: dict[str, list[Decoded]] = defaultdict(list)
    for _ in range(options.rounds):
        turn = decode_moebox(path, reference, share)
        turn["accelerate"] = decode_baseline(path, first, share, AcceleratedExperts)
        turn["mmap"] = decode_baseline(path, first, share, MappedExperts)
        for name, decoded in turn.items():
            turns[name].append(decoded)
    figures = compare(turns, options.baseline_tokens)
    figures |= {"share": share, "in_ram_token_ms": 1e3 * statistics.mean(reference.seconds)}
    figures["guesses"] = measure_alternating(path, reference, share)
    figures |= measure_road(path, options.rounds)
    return figures


def compare(turns: dict[str, list[Decoded]], n_first: int) -> dict[str, Any]:
    """Means over a turn, medians over the rounds; baselines are compared with the same tokens of moebox."""
    means_ms = {name: [1e3 * statistics.mean(turn.seconds) for turn in all_] for name, all_ in turns.items()}
    ms = {name: statistics.median(means) for name, means in means_ms.items()}
    first_ms = statistics.median(1e3 * statistics.mean(turn.seconds[:n_first]) for turn in turns["prefetch"])
    return {
        "identical": all(turn.identical for all_ in turns.values() for turn in all_),
        "token_ms": ms,
        "all_token_ms": means_ms,
        "first_token_ms": first_ms,
        "hit_rate": {name: turns[name][0].hit_rate for name in ("prefetch", "no_prefetch")},
        "load_s": statistics.median(turn.load_s for turn in turns["prefetch"]),
        "prefetch_change": paired_change(turns),
        "trial_cost": max(turn.trial_cost for turn in turns["prefetch"]),
        "over_accelerate": ms["accelerate"] / first_ms,
        "over_mmap": ms["mmap"] / first_ms,
    }


def paired_change(turns: dict[str, list[Decoded]]) -> dict[str, float]:
    """Relative change of a token's time by prefetching, trials included: of all tokens, with its standard
    error, and of the later half of each round. It is the mean of the logarithms' differences, token by token.
    """
    pairs = [
        np.log(np.divide(on.seconds, off.seconds))
        for on, off in zip(turns["prefetch"], turns["no_prefetch"], strict=True)
    ]
    every, later = np.concatenate(pairs), np.concatenate([pair[len(pair) // 2 :] for pair in pairs])
    return {
        "all": float(np.expm1(every.mean())),
        "later_half": float(np.expm1(later.mean())),
        "error": float(every.std(ddof=1) / len(every) ** 0.5),
    }


def decode_in_ram(path: Path, n_tokens: int) -> Reference:
    """Tokens after a prompt, with all experts in RAM; sampled, since greedy ones of random weights repeat."""
    with opened(path, 1.0, prefetch=False) as engine:
        prompt = np.random.default_rng(0).integers(0, engine.config.vocab_size, 16).tolist()
        session, generator = engine.session(), torch.Generator().manual_seed(0)
        logits, tokens, seconds = [session.prefill(prompt)], [], []
        for _ in range(n_tokens):
            tokens.append(int(torch.multinomial(logits[-1].softmax(-1), 1, generator=generator)))
            began_s = time.perf_counter()
            logits.append(session.decode(tokens[-1]))
            seconds.append(time.perf_counter() - began_s)
        return Reference(prompt, tokens, logits, seconds)


@contextmanager
def opened(path: Path, share: float, *, prefetch: bool) -> Iterator[Engine]:
    """An engine whose RAM holds a share of the experts."""
    checkpoint = Checkpoint.open(path)
    dtype = torch.bfloat16
    ram = budget_for_share(checkpoint.config, dtype, "bf16", CONTEXT, share)
    engine = Engine.load(
        path,
        LoadOptions(device="cpu", ram=ram, dtype=dtype, context=CONTEXT, prefetch=prefetch, statistics=False),
    )
    try:
        yield engine
    finally:
        engine.close()


def decode_moebox(path: Path, reference: Reference, share: float) -> dict[str, Decoded]:
    """Decode as `moebox run --ram` does, with prefetching and without: two engines alternate token by token,
    so that both have the same conditions."""
    began_s = time.perf_counter()
    with opened(path, share, prefetch=True) as prefetching, opened(path, share, prefetch=False) as plain:
        load_s = (time.perf_counter() - began_s) / 2
        both = [Replay(engine, reference) for engine in (prefetching, plain)]
        for token in reference.tokens:
            for one in both:
                one.step(token)
            both.reverse()
        replays = {one.engine: one for one in both}
        return {
            name: decoded(replays[engine], load_s)
            for name, engine in (("prefetch", prefetching), ("no_prefetch", plain))
        }


def decoded(replay: Replay, load_s: float) -> Decoded:
    """The figures of a replay by moebox."""
    experts = experts_of(replay.engine)
    counts, prefetching = experts.cache.counts, experts.prefetcher
    hit_rate = counts.hits / (counts.hits + counts.prefetched + counts.reads)
    trial_s = prefetching.trial.cost_s if isinstance(prefetching, Prefetcher) else 0.0
    return Decoded(replay.seconds, replay.identical, hit_rate, load_s, trial_s / sum(replay.seconds))


class InTurns(Trial):
    """Prefetching is on, off, off, on, and so forth; nothing is decided."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.tokens: list[tuple[float, int, bool]] = []

    def observe(self, seconds: float, to_read: int) -> bool:
        """Keep the token; returns False."""
        self.tokens.append((math.log(seconds), to_read, self.on))
        self.on = not (len(self.tokens) ^ len(self.tokens) >> 1) & 1
        return False


def measure_alternating(path: Path, reference: Reference, share: float) -> dict[str, Any]:
    """Prefetch at every other token of one run: the change of a token's time, and the reads."""
    with opened(path, share, prefetch=True) as engine:
        prefetcher = experts_of(engine).prefetcher
        assert isinstance(prefetcher, Prefetcher)
        prefetcher.trial = trial = InTurns()
        Replay(engine, reference).run()
        change, error = fit_change(trial.tokens)
        report = prefetcher.report()
    return {
        "change": math.expm1(change),
        "error": error,
        "recall": report.recall,
        "needed": (report.used + report.late) / max(report.issued, 1),
        **{name: getattr(report, name) for name in ("issued", "used", "late", "wrong", "wasted_bytes")},
    }


def decode_baseline(path: Path, reference: Reference, share: float, kind: type[Baseline]) -> Decoded:
    """Decode with the same model, but a baseline's experts."""
    began_s = time.perf_counter()
    with opened(path, 0.0, prefetch=False) as engine:
        checkpoint = Checkpoint.open(path)
        n_keys = checkpoint.config.n_keys
        limit = round(share * n_keys)
        baseline = kind(checkpoint, cpu.ThreadPool(), limit)
        baseline.warm(range(0, n_keys, max(1, n_keys // limit)))
        engine.runner.model.connect(baseline)
        load_s = time.perf_counter() - began_s
        replay = Replay(engine, reference, lambda: baseline.cache.seconds).run()
        baseline.cache.drop_all()
    return Decoded(replay.seconds, replay.identical, 0.0, load_s)


def experts_of(engine: Engine) -> CpuExperts:
    """The engine's routed experts."""
    experts = engine.runner.model.model.layers[-1].mlp.experts
    assert isinstance(experts, CpuExperts)
    return experts


class Replay:
    """An engine that decodes the reference's tokens.

    Attributes:
        seconds: of each token but for those that `apart_s` counts.
        identical: whether all logits are right so far.
    """

    def __init__(
        self, engine: Engine, reference: Reference, apart_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.engine, self.seconds = engine, list[float]()
        self._session, self._reference, self._apart_s = engine.session(), reference, apart_s
        self.identical = torch.equal(self._session.prefill(reference.prompt), reference.logits[0])

    def step(self, token: int) -> None:
        """Decode one token."""
        began_s, apart_before_s = time.perf_counter(), self._apart_s()
        logits = self._session.decode(token)
        self.seconds.append(time.perf_counter() - began_s - (self._apart_s() - apart_before_s))
        self.identical &= torch.equal(logits, self._reference.logits[len(self.seconds)])

    def run(self) -> Replay:
        """Decode all of them."""
        for token in self._reference.tokens:
            self.step(token)
        return self


def measure_road(path: Path, rounds: int) -> dict[str, Any]:
    """GB/s where no expert is in RAM, and GB/s of plain O_DIRECT reads of the same experts, in turns."""
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    with ExpertStore.open(checkpoint) as store:
        rows = 3 * config.num_experts_per_tok
        experts = CpuExperts.load(config, store, cpu.ThreadPool(), rows)
        plain = PlainReads(checkpoint)
        tried = [(plain.gbps(way, ROAD_S / 4), way) for _ in range(2) for way in READ_WAYS]
        way = max(tried)[1]
        shares, roads, drives = [], [], []
        for _ in range(2 * rounds + 1):
            before = plain.gbps(way, ROAD_S / 2)
            roads.append(road_gbps(experts, ROAD_S))
            drives.append((before + plain.gbps(way, ROAD_S / 2)) / 2)
            shares.append(roads[-1] / drives[-1])
    return {
        "expert_bytes": config.expert_bytes,
        "read_depth": {"moebox": [drive.depth for drive in store.traffic().drives], "plain": way[0]},
        "road_gbps": statistics.median(roads),
        "drive_gbps": statistics.median(drives),
        "road_share": statistics.median(shares),
        "all_road_shares": shares,
    }


def road_gbps(experts: CpuExperts, seconds: float) -> float:
    """Decode tokens whose picks are all on the drive."""
    config, rng = experts.config, np.random.default_rng(int(time.time()))
    k, n_experts = config.num_experts_per_tok, config.n_routed_experts
    hidden = torch.randn(1, config.hidden_size).bfloat16()
    weights = torch.full((1, k), 1 / k)
    nbytes, began_s = 0, time.perf_counter()
    for moe in itertools.cycle(range(len(config.moe_layers))):
        cold = [e for e in range(n_experts) if not experts.cache.in_ram(moe * n_experts + e)]
        ids = torch.from_numpy(rng.choice(cold, k, replace=False)).reshape(1, k)
        experts.forward(config.moe_layers[moe], ids, weights, hidden)
        assert experts.last.cold == k
        nbytes += experts.last.cold_bytes
        if time.perf_counter() - began_s > seconds:
            return nbytes / (time.perf_counter() - began_s) / 1e9
    raise AssertionError


class PlainReads:
    """O_DIRECT reads of whole experts by Python threads, each of which reads one after the other."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._nbytes = -(-checkpoint.config.expert_bytes // 4096) * 4096
        extents = [infos[0] for layer in find_experts(checkpoint).values() for infos in layer]
        files = {info.file: os.open(info.file, os.O_RDONLY | os.O_DIRECT) for info in extents}
        self._places = [(files[info.file], info.offset // 4096 * 4096) for info in extents]
        self._random = random.Random(0)

    def gbps(self, way: tuple[int, int], seconds: float) -> float:
        """GB/s with so many reads under way, of so many bytes each."""
        depth, nbytes = way
        end_s = time.perf_counter() + seconds
        began_s = time.perf_counter()
        with ThreadPoolExecutor(depth) as executor:
            counts = list(executor.map(lambda _: self._read_until(end_s, nbytes), range(depth)))
        return sum(counts) * self._nbytes / (time.perf_counter() - began_s) / 1e9

    def _read_until(self, end_s: float, nbytes: int) -> int:
        buffer, count = mmap.mmap(-1, self._nbytes), 0
        buffer.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(buffer)
        while time.perf_counter() < end_s:
            file, offset = self._random.choice(self._places)
            for first in range(0, self._nbytes, nbytes):
                os.preadv(file, [view[first : first + nbytes]], offset + first)
            count += 1
        return count


def describe(name: str, figures: dict[str, Any]) -> None:
    """Print the figures for people."""
    ms = figures["token_ms"]
    share, same = figures["share"], figures["identical"]
    print(f"{name}: {share:.0%} of the experts in RAM; logits as with all of them: {same}")
    print(
        f"  ms a token: all in RAM {figures['in_ram_token_ms']:.1f}, "
        + ", ".join(f"{contender} {value:.1f}" for contender, value in ms.items())
    )
    prefetching, change = figures["guesses"], figures["prefetch_change"]
    print(
        f"  prefetching at every other token: {prefetching['change']:+.1%} of a token's time (standard error "
        f"{prefetching['error']:.1%}), {prefetching['needed']:.0%} of {prefetching['issued']} reads needed"
    )
    print(
        f"  prefetch: {change['all']:+.1%} of a token's time (standard error {change['error']:.1%}), "
        f"{change['later_half']:+.1%} in the later half; its trials cost {figures['trial_cost']:.2%}"
    )
    print(f"  over accelerate {figures['over_accelerate']:.2f}x, over mmap {figures['over_mmap']:.2f}x")
    print(
        f"  every pick on the drive: {figures['road_gbps']:.2f} GB/s, plain O_DIRECT reads "
        f"{figures['drive_gbps']:.2f} GB/s: {figures['road_share']:.0%}"
    )


if __name__ == "__main__":
    main()
