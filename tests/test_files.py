"""Locks between processes, durable replacement of files, and what a failed write says."""

import errno
import os
import threading

import pytest

from moebox.errors import CheckpointError, PlanError
from moebox.files import FileLock, existing_folder, free_bytes, locked, replace_file, writing


def test_a_lock_is_exclusive_until_it_is_released(tmp_path):
    first, second = FileLock(tmp_path / "new" / "lock"), FileLock(tmp_path / "new" / "lock")
    assert first.acquire(wait=False)
    assert first.acquire(wait=False)  # held already
    assert not second.acquire(wait=False)
    assert not second.held
    first.release()
    assert second.acquire(wait=False)
    second.release()


def test_a_lock_file_that_its_owner_removed_locks_nothing(tmp_path):
    path = tmp_path / "lock"
    first, second, third = FileLock(path), FileLock(path), FileLock(path)
    first.acquire()
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    path.unlink()
    first.release()
    waiting.join(10)
    assert second.held
    assert os.path.samestat(path.stat(), os.fstat(second._descriptor))
    assert not third.acquire(wait=False)
    second.release()


def test_locked_waits_for_the_other_holder(tmp_path):
    path, events = tmp_path / "data", []

    def other():
        with locked(path):
            events.append("other")

    with locked(path):
        waiting = threading.Thread(target=other)
        waiting.start()
        waiting.join(0.1)
        events.append("first")
    waiting.join(10)
    assert events == ["first", "other"]
    assert not path.exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "data"
    replace_file(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync" if call == "fsync" else "pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_is_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "data"
    for data in (b"old", b"new"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, PlanError), (errno.EDQUOT, PlanError), (errno.EACCES, CheckpointError)],
)
def test_a_failed_write_names_file_and_fix(tmp_path, number, error):
    with pytest.raises(error, match=f"{tmp_path}/x: .*\n.*"), writing(tmp_path / "x"):
        raise OSError(number, os.strerror(number))
    with pytest.raises(error, match=f"{tmp_path}/y: "), writing(tmp_path / "x"):
        raise OSError(number, os.strerror(number), str(tmp_path / "y"))


def test_free_space_of_a_folder_to_come_is_that_of_its_parent(tmp_path, monkeypatch):
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    assert free_bytes(tmp_path / "a" / "b") > 0
    monkeypatch.chdir(tmp_path)
    assert existing_folder(tmp_path.relative_to(tmp_path) / "a") == tmp_path
