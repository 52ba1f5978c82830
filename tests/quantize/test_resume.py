"""After a kill, an interrupt or a torn journal the same command gives the same bytes, or says why not."""

import json
import os
import random
import signal
import time

import pytest

from helpers.convert import SHARD_BYTES, contents, kill_when, make_source, start
from moebox.errors import BusyError, CheckpointError
from moebox.quantize.convert import quantize
from moebox.quantize.output.journal import DestinationLock, Journal


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "fp8")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    dst = tmp_path_factory.mktemp("reference") / "out"
    quantize(source, dst, shard_bytes=SHARD_BYTES)
    return contents(dst)


def finished(dst) -> list[str]:
    return sorted(path.name for path in dst.glob("*.safetensors"))


class Halt(Exception):
    pass


def stop_at(shards: int):
    def progress(report) -> None:
        if report.shard >= shards:
            raise Halt

    return progress


def halted(source, dst, shards=3, **options):
    """An in-process run that ends after some shards."""
    with pytest.raises(Halt):
        quantize(source, dst, shard_bytes=SHARD_BYTES, progress=stop_at(shards), **options)


@pytest.mark.slow
def test_killed_again_and_again(source, expected, tmp_path):
    dst = tmp_path / "out"
    journal = dst / ".moebox" / "journal.jsonl"
    moments = [
        (dst / ".moebox" / "lock").exists,
        journal.exists,
        lambda: any((dst / ".moebox").glob("*.partial")),
        lambda: len(finished(dst)) >= 2,
        lambda: len(finished(dst)) >= 5,
        lambda: len(finished(dst)) >= 9,
        (dst / "config.json").exists,
        (dst / "moebox.json").exists,
    ]
    kept: dict[str, int] = {}
    for moment in moments:
        kill_when(start(source, dst, delay_s=0.01), moment)
        now = {name: (dst / name).stat().st_mtime_ns for name in finished(dst)}
        for name, stamp in kept.items():
            assert now[name] == stamp, f"{name} was journaled, yet made again"
        loaded = Journal(dst)
        loaded.load()
        kept = {name: now[name] for name in loaded.shards}
    result = quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert contents(dst) == expected
    assert result.shards_resumed >= 9


@pytest.mark.slow
def test_killed_at_random_moments(source, expected, tmp_path):
    rng = random.Random(0)
    for attempt in range(3):
        dst = tmp_path / str(attempt)
        child = start(source, dst, delay_s=0.005)
        while not dst.exists():
            time.sleep(0.001)
        deadline = time.monotonic() + rng.uniform(0, 0.6)
        kill_when(child, lambda: time.monotonic() > deadline)  # noqa: B023
        quantize(source, dst, shard_bytes=SHARD_BYTES)
        assert contents(dst) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupts_leave_a_state_to_resume_from(source, expected, tmp_path, name):
    dst = tmp_path / "out"
    child = start(source, dst, delay_s=0.02)
    while len(finished(dst)) < 3:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(getattr(signal, name))
    errors = child.wait()
    assert child.returncode in (-signal.SIGINT, 1, 128 + signal.SIGTERM)
    assert ("KeyboardInterrupt" in errors) == (name == "SIGINT")
    assert not list((dst / ".moebox").glob("*.partial"))
    result = quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert result.shards_resumed >= 2
    assert contents(dst) == expected


@pytest.mark.slow
def test_a_running_conversion_excludes_another_and_a_killed_one_does_not(source, expected, tmp_path):
    dst = tmp_path / "out"
    child = start(source, dst, delay_s=0.05)
    while not finished(dst):
        time.sleep(0.005)
    with pytest.raises(BusyError, match=f"process {child.pid} is writing it"):
        quantize(source, dst, shard_bytes=SHARD_BYTES)
    child.send_signal(signal.SIGKILL)
    child.wait()
    quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert contents(dst) == expected


def test_a_lock_that_its_owner_removed_can_be_taken(tmp_path):
    first, second = DestinationLock(tmp_path), DestinationLock(tmp_path)
    first.acquire()
    first.release_and_remove()
    assert not (tmp_path / ".moebox").exists()
    second.acquire()
    with pytest.raises(BusyError, match=str(os.getpid())):
        DestinationLock(tmp_path).acquire()
    second.release()


@pytest.mark.parametrize("tail", [b'{"shard": "model-00004-of', b"\0" * 40, b"\0" * 40 + b"\n"])
def test_torn_last_journal_line_is_ignored(source, expected, tmp_path, tail):
    dst = tmp_path / "out"
    halted(source, dst)
    journal = dst / ".moebox" / "journal.jsonl"
    lines = len(journal.read_bytes().splitlines())
    with journal.open("ab") as file:
        file.write(tail)
    result = quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert result.shards_resumed == lines - 1
    assert contents(dst) == expected


def test_damaged_journal_is_refused(source, tmp_path):
    dst = tmp_path / "out"
    halted(source, dst)
    journal = dst / ".moebox" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"garbage\n" + b"".join(lines[1:]))
    with pytest.raises(CheckpointError, match="line 2 is damaged"):
        quantize(source, dst, shard_bytes=SHARD_BYTES)


def test_a_finished_shard_that_vanished_is_made_again(source, expected, tmp_path):
    dst = tmp_path / "out"
    halted(source, dst)
    (dst / finished(dst)[0]).unlink()
    quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert contents(dst) == expected


def test_changed_source_or_options_are_refused(tmp_path):
    source, dst = make_source(tmp_path / "fp8"), tmp_path / "out"
    halted(source, dst)
    with pytest.raises(CheckpointError, match=f"begun with shard_bytes = {SHARD_BYTES}, now it is 70000"):
        quantize(source, dst, shard_bytes=70000)
    before = contents(dst)
    shard = sorted(source.glob("*.safetensors"))[1]
    stamp = shard.stat().st_mtime_ns
    os.utime(shard, ns=(stamp, stamp + 1))
    with pytest.raises(CheckpointError, match=f"{shard.name}: stamp"):
        quantize(source, dst, shard_bytes=SHARD_BYTES)
    os.utime(shard, ns=(stamp, stamp))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"routed_scaling_factor": 1.5}))
    with pytest.raises(CheckpointError, match="begun with config"):
        quantize(source, dst, shard_bytes=SHARD_BYTES)
    assert contents(dst) == before
    quantize(source, dst, shard_bytes=SHARD_BYTES, resume=False)
    assert json.loads((dst / "config.json").read_text())["routed_scaling_factor"] == 1.5


def test_no_resume_starts_over(source, expected, tmp_path):
    dst = tmp_path / "out"
    halted(source, dst)
    result = quantize(source, dst, shard_bytes=SHARD_BYTES, resume=False)
    assert result.shards_resumed == 0
    assert contents(dst) == expected
    again = quantize(source, dst, shard_bytes=SHARD_BYTES, resume=False)
    assert again.shards_resumed == 0
    assert contents(dst) == expected


def test_complete_output_of_another_source_is_refused(source, expected, tmp_path):
    dst = tmp_path / "out"
    quantize(source, dst, shard_bytes=SHARD_BYTES)
    other = make_source(tmp_path / "other")
    with pytest.raises(CheckpointError, match="made from something else: fp8, not other"):
        quantize(other, dst)
    assert contents(dst) == expected


def test_delete_source_keeps_what_is_still_needed(expected, tmp_path):
    source, dst = make_source(tmp_path / "fp8"), tmp_path / "out"
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 3
    halted(source, dst, shards=10, delete_source=True)
    left = sorted(source.glob("*.safetensors"))
    assert 0 < len(left) < len(shards)
    result = quantize(source, dst, shard_bytes=SHARD_BYTES, delete_source=True)
    assert result.shards_resumed >= 9
    assert not list(source.glob("*.safetensors"))
    assert (source / "config.json").exists()
    assert contents(dst) == expected
    assert quantize(source, dst, shard_bytes=SHARD_BYTES).shards_resumed == result.shards


@pytest.mark.slow
def test_delete_source_survives_kills(expected, tmp_path):
    source, dst = make_source(tmp_path / "fp8"), tmp_path / "out"
    shards = len(list(source.glob("*.safetensors")))
    for remaining in (shards - 1, shards - 3, 0):
        child = start(source, dst, delay_s=0.01, delete_source=True)
        kill_when(child, lambda: len(list(source.glob("*.safetensors"))) <= remaining)  # noqa: B023
    quantize(source, dst, shard_bytes=SHARD_BYTES, delete_source=True)
    assert contents(dst) == expected
