"""How fast `moebox quantize` reads its source, beside the disk's own speed, and how much memory it takes.

    python benchmarks/quantize.py --dir /mnt/nvme/bench --experts 384

The steps: make a random K2-shaped FP8 checkpoint of one dense and one MoE layer (17 GB with all 384 experts)
in `--dir`, or take `--source`; read it with O_DIRECT, which gives the disk's own speed; drop it from the
page cache; convert it in a child process whose memory is sampled; remove what was made. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moebox.kernels.cpu import allowed_cpus
from moebox.quantize.page_cache import drop_cache
from moebox.quantize.synth.write import synth

DIRECT_CHUNK_BYTES = 16 << 20
DIRECT_THREADS = 2
SAMPLE_INTERVAL_S = 0.02

CHILD = """
import json, resource, sys
from moebox.quantize.convert import quantize
src, dst, workers = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
result = quantize(src, dst, workers=int(workers) or None)
usage = resource.getrusage(resource.RUSAGE_SELF)
used = {"maxrss_bytes": usage.ru_maxrss * 1024, "cpu_s": usage.ru_utime + usage.ru_stime}
print(json.dumps(result.to_dict() | used))
"""


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder with space for source and output")
    parser.add_argument("--experts", type=int, default=64, help="routed experts of the one MoE layer")
    parser.add_argument("--source", type=Path, help="take this checkpoint instead of making one")
    parser.add_argument("--workers", type=int, default=0, help="threads; 0: moebox's default")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="moebox-quantize-") as scratch:
        source = options.source or Path(scratch) / "source"
        if not options.source:
            synth(source, "kimi-k2", layers=2, experts=options.experts)
        figures = run(source, Path(scratch) / "output", options.workers)
    if not options.json:
        describe(figures)
    print(json.dumps(figures))


def run(source: Path, output: Path, workers: int) -> dict[str, Any]:
    """All figures of one conversion; the disk is timed before and after it."""
    shards = sorted(source.glob("*.safetensors"))
    os.sync()
    before = read_direct_gbps(shards)
    for shard in shards:
        drop_cache(shard)
    result = convert(source, output, workers)
    after = read_direct_gbps(shards)
    disk_gbps = max(before, after)
    source_gbps = result["source_bytes"] / result["elapsed_s"] / 1e9
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    shutil.rmtree(output)
    return {
        "source_bytes": result["source_bytes"],
        "output_bytes": size,
        "workers": workers or allowed_cpus(),
        "elapsed_s": result["elapsed_s"],
        "cpu_s": result["cpu_s"],
        "source_gbps": source_gbps,
        "disk_read_gbps": disk_gbps,
        "disk_read_gbps_samples": [before, after],
        "ratio": source_gbps / disk_gbps,
        "traffic_gbps": (result["source_bytes"] + size) / result["elapsed_s"] / 1e9,
        "peak_anonymous_bytes": result["peak_anonymous_bytes"],
        "peak_rss_bytes": result["maxrss_bytes"],
        "rel_rms": result["rel_rms"],
    }


def read_direct_gbps(files: list[Path], limit_bytes: int = 8 << 30) -> float:
    """Sequential O_DIRECT read of at most `limit_bytes` of `files` by two threads, past the page cache."""
    chunks = [
        (file, offset)
        for file in files
        for offset in range(0, file.stat().st_size - DIRECT_CHUNK_BYTES, DIRECT_CHUNK_BYTES)
    ][: limit_bytes // DIRECT_CHUNK_BYTES]
    start = time.perf_counter()
    with ThreadPoolExecutor(DIRECT_THREADS) as pool:
        total = sum(pool.map(_read_direct, (chunks[i::DIRECT_THREADS] for i in range(DIRECT_THREADS))))
    return total / (time.perf_counter() - start) / 1e9


def _read_direct(chunks: list[tuple[Path, int]]) -> int:
    total, buffer = 0, mmap.mmap(-1, DIRECT_CHUNK_BYTES)  # page-aligned, as O_DIRECT wants
    for file, offset in chunks:
        descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
        try:
            total += os.preadv(descriptor, [buffer], offset)
        finally:
            os.close(descriptor)
    return total


def convert(source: Path, output: Path, workers: int) -> dict[str, Any]:
    """Run `quantize` in a child process and sample its memory."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(source), str(output), str(workers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    replies = child.stdout
    if replies is None or child.stdin is None or replies.readline() != "ready\n":
        raise SystemExit("the child did not start")
    child.stdin.write("go\n")
    child.stdin.flush()
    peak = 0
    while child.poll() is None:
        peak = max(peak, _anonymous_bytes(child.pid))
        time.sleep(SAMPLE_INTERVAL_S)
    if child.returncode:
        raise SystemExit(child.returncode)
    result: dict[str, Any] = json.loads(replies.read().splitlines()[-1])
    return result | {"peak_anonymous_bytes": peak}


def _anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def describe(figures: dict[str, Any]) -> None:
    """Print the figures as text."""
    print(
        f"source {figures['source_bytes'] / 1e9:.2f} GB -> {figures['output_bytes'] / 1e9:.2f} GB in "
        f"{figures['elapsed_s']:.1f} s on {figures['workers']} threads, "
        f"{figures['cpu_s']:.1f} s of processor"
    )
    print(
        f"source read at {figures['source_gbps']:.2f} GB/s; the disk's own "
        f"{figures['disk_read_gbps']:.2f} GB/s (O_DIRECT); ratio {figures['ratio']:.2f}; "
        f"disk traffic both ways {figures['traffic_gbps']:.2f} GB/s"
    )
    print(
        f"peak memory {figures['peak_anonymous_bytes'] / 1e9:.2f} GB of its own, "
        f"{figures['peak_rss_bytes'] / 1e9:.2f} GB with mapped pages"
    )


if __name__ == "__main__":
    main()
