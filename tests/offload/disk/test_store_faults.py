"""Faults of drives and shards end in the right bytes or in a clear error, never in wrong weights."""

import errno
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.runtime import make_checkpoint
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.disk.store import ExpertStore
from moebox.quantize.convert import quantize

SHM = Path("/dev/shm")
FIRST = "model.layers.1.mlp.experts.0"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    make_checkpoint(folder / "model")
    quantize(folder / "model", folder / "int4", shard_bytes=60_000)
    return folder / "int4"


@pytest.fixture(scope="module")
def expected(whole):
    with ExpertStore.open(Checkpoint.open(whole), depth=2) as store:
        return read_all(store)


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def other_drive(whole, tmp_path):
    """Copies of all shards on another device."""
    folder = SHM / f"moebox-{tmp_path.name}"
    shutil.copytree(whole, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request):
    return request.param


def open_store(folder: Path, *stores: Path, **options) -> ExpertStore:
    return ExpertStore.open(Checkpoint.open(folder, stores), **{"depth": 2} | options)


def read_all(store: ExpertStore) -> np.ndarray:
    rows = np.zeros((store.n_keys, store.expert_bytes), np.uint8)
    for ticket in [store.submit(key, row) for key, row in enumerate(rows)]:
        store.wait(ticket)
    return rows


def read_one(store: ExpertStore, key: int = 0) -> np.ndarray:
    row = np.zeros(store.expert_bytes, np.uint8)
    store.read(key, row)
    return row


def shard_of(store: ExpertStore, key: int) -> Path:
    paths = sorted({path for paths in store.drives.values() for path in paths})
    return paths[store.runs(key)[0][0]]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENOMEM])
def test_read_errors_are_named(folder, expected, direct, number):
    with open_store(folder, direct=direct) as store:
        store.reader.inject("", "error", number, count=1)
        with pytest.raises(CheckpointError) as failure:
            read_one(store)
        _, offset, _ = store.runs(0)[0]
        shard = shard_of(store, 0)
        begin = offset // 4096 * 4096 if direct else offset
        assert failure.value.what == f"{shard}: {FIRST}: byte {begin}: {os.strerror(number)}"
        assert "--store" in failure.value.fix
        assert np.array_equal(read_all(store), expected)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_interrupted_reads_are_repeated(folder, expected, direct, number):
    with open_store(folder, direct=direct) as store:
        store.reader.inject("", "error", number, count=30)
        assert np.array_equal(read_all(store), expected)


def test_reads_that_are_interrupted_for_ever_end(folder):
    with open_store(folder) as store:
        store.reader.inject("", "error", errno.EINTR)
        with pytest.raises(CheckpointError, match="Interrupted"):
            read_one(store)


@pytest.mark.parametrize("nbytes", [1, 600, 4096, 5000])
def test_short_reads_are_gone_on_with(folder, expected, direct, nbytes):
    with open_store(folder, direct=direct) as store:
        store.reader.inject("", "shorten", nbytes, count=50)
        assert np.array_equal(read_all(store), expected)


def test_reads_that_give_nothing(folder, direct):
    with open_store(folder, direct=direct) as store:
        store.reader.inject("", "shorten", 0)
        with pytest.raises(CheckpointError, match=rf"{FIRST}: byte \d+: the file ends before it should\n"):
            read_one(store)


def test_a_file_that_shrank(folder, expected, direct):
    with open_store(folder, direct=direct) as store:
        assert np.array_equal(read_one(store), expected[0])
        os.truncate(shard_of(store, 0), 4096)
        with pytest.raises(CheckpointError, match=r"the file has changed since it was opened\n.*start again"):
            read_one(store)


def test_a_file_that_was_written_to(folder, expected, direct):
    with open_store(folder, direct=direct) as store:
        assert np.array_equal(read_one(store), expected[0])
        shard = shard_of(store, 0)
        with shard.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        others = [key for key in range(store.n_keys) if shard_of(store, key) != shard]
        with pytest.raises(CheckpointError, match=f"{shard}: {FIRST}: .* has changed since it was opened"):
            read_one(store)
        for key in others:
            assert np.array_equal(read_one(store, key), expected[key])


@pytest.mark.parametrize("remove", [False, True])
def test_a_file_that_was_replaced_is_read_as_it_was(folder, expected, direct, remove):
    with open_store(folder, direct=direct) as store:
        for shard in folder.glob("*.safetensors"):
            new = shard.with_suffix(".new")
            new.write_bytes(bytes(shard.stat().st_size))
            new.replace(shard)
            if remove:
                shard.unlink()
        assert np.array_equal(read_all(store), expected)


def test_flipped_bits_are_found_where_reads_are_verified(folder, expected, direct):
    with open_store(folder, direct=direct, verify=True) as store:
        store.reader.inject("", "flip", 16, count=1)
        with pytest.raises(CheckpointError, match=rf"{FIRST}: byte \d+: the checksum differs\n.*--verify"):
            read_one(store)
        assert np.array_equal(read_all(store), expected)


@pytest.mark.parametrize("damaged", ["own", "other"])
def test_a_copy_takes_over_from_one_that_differs(folder, other_drive, expected, caplog, damaged):
    bad = {"own": folder, "other": other_drive}[damaged]
    with open_store(folder, other_drive, verify=True) as store:
        store.reader.inject(str(bad), "flip", 16)  # every read of that copy, whichever pieces it gives
        assert np.array_equal(read_all(store), expected)
        assert np.array_equal(read_all(store), expected)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) <= len(list(folder.glob("*.safetensors")))
    assert all(f"{bad}/" in message and "the checksum differs: this copy" in message for message in said)


def test_copies_that_all_differ_are_an_error(folder, other_drive):
    with open_store(folder, other_drive, verify=True) as store:
        store.reader.inject("", "flip", 16)
        with pytest.raises(CheckpointError, match=rf"{FIRST}: byte \d+: the checksum differs\n.*--verify"):
            read_one(store)


def test_a_damaged_copy_on_the_same_drive(folder, tmp_path, expected):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with open_store(folder, copy, verify=True) as store:
        store.reader.inject(str(folder), "flip", 16)
        assert np.array_equal(read_all(store), expected)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENODEV])
def test_a_copy_takes_over(folder, other_drive, expected, caplog, number):
    with open_store(folder, other_drive) as store:
        store.reader.inject(str(folder), "error", number, after=2)
        store.reader.inject(str(other_drive), "delay", 5_000, count=40)
        assert np.array_equal(read_all(store), expected)
        assert np.array_equal(read_all(store), expected)
    said = [record.getMessage() for record in caplog.records]
    assert 0 < len(said) == len(set(said)) <= len(list(folder.glob("*.safetensors")))
    assert all(f"{folder}/" in message and "this copy is not used any more" in message for message in said)


@pytest.mark.parametrize("damage", ["truncate", "write"])
def test_a_copy_that_changed_is_not_used(folder, other_drive, expected, damage):
    with open_store(folder, other_drive) as store:
        for shard in other_drive.glob("*.safetensors"):
            if damage == "truncate":
                os.truncate(shard, 4096)
            else:
                shard.write_bytes(bytes(shard.stat().st_size))
        assert np.array_equal(read_all(store), expected)


def test_both_drives_fail(folder, other_drive, expected):
    with open_store(folder, other_drive) as store:
        store.reader.inject(str(folder), "error", errno.ENODEV)
        store.reader.inject(str(other_drive), "error", errno.EIO, count=1)
        with pytest.raises(CheckpointError, match=r"safetensors: model\.layers"):
            read_all(store)
    with open_store(folder, other_drive) as store:
        # Either copy may have been given up; the one whose drive answers again is read.
        store.reader.inject(str(folder), "error", errno.ENODEV)
        store.reader.inject(str(other_drive), "error", errno.EIO, count=1)
        with pytest.raises(CheckpointError):
            read_one(store)
        assert np.array_equal(read_one(store), expected[0])


def test_two_copies_on_one_drive(folder, whole, expected):
    with open_store(folder, whole) as store:
        store.reader.inject(str(folder), "error", errno.EIO)
        assert np.array_equal(read_all(store), expected)


def test_an_error_of_a_prefetch_is_raised_by_wait(folder, expected):
    with open_store(folder) as store:
        store.reader.inject("", "error", errno.EIO, count=2)
        rows = np.zeros((3, store.expert_bytes), np.uint8)
        tickets = [store.submit(key, row, prefetch=True) for key, row in enumerate(rows)]
        while not all(map(store.ready, tickets)):
            pass
        assert store.cancel(tickets[0]) < store.expert_bytes
        for key in (1, 2):
            try:
                store.wait(tickets[key])
            except CheckpointError:
                continue
            assert np.array_equal(rows[key], expected[key])
        assert np.array_equal(read_all(store), expected)


@pytest.mark.parametrize("seed", range(4))
def test_faults_at_random(folder, other_drive, expected, seed):
    """With any mixture of faults, every read that reports success is right."""
    rng = random.Random(seed)
    with open_store(folder, other_drive, verify=True, depth=3) as store:
        for _ in range(12):
            kind, value = rng.choice(
                [("error", errno.EIO), ("error", errno.EINTR), ("shorten", 700), ("flip", 1), ("delay", 500)]
            )
            place = rng.choice([folder, other_drive])
            store.reader.inject(str(place), kind, value, after=rng.randrange(60), count=rng.randrange(1, 9))
        right = failed = 0
        for _ in range(15):
            rows = np.zeros((store.n_keys, store.expert_bytes), np.uint8)
            tickets = [store.submit(key, row, prefetch=rng.random() < 0.3) for key, row in enumerate(rows)]
            for key, ticket in rng.sample(list(enumerate(tickets)), len(tickets)):
                if rng.random() < 0.2:
                    store.cancel(ticket)
                    continue
                try:
                    store.wait(ticket)
                except CheckpointError:
                    failed += 1
                else:
                    assert np.array_equal(rows[key], expected[key])
                    right += 1
        assert right > failed


@pytest.mark.slow
def test_interrupts_leave_the_read_going(folder, expected):
    with open_store(folder) as store:
        store.reader.inject("", "delay", 1_000_000, count=1)
        row = np.zeros(store.expert_bytes, np.uint8)
        ticket = store.submit(0, row)
        while not store.traffic().busy_s:
            time.sleep(0.001)
        threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            store.wait(ticket)
        assert not store.ready(ticket)
        store.wait(ticket)
        assert np.array_equal(row, expected[0])
