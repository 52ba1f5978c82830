"""Drives are measured by real reads of files that are large enough."""

import pytest

from moebox.errors import CheckpointError
from moebox.offload.machine import drive_speed
from moebox.offload.machine.drive_speed import DriveSpeed, measure_drive

PIECE_BYTES = 1 << 20


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(drive_speed, "LEAST_BYTES", 8 << 20)
    monkeypatch.setattr(drive_speed, "READ_BYTES", 3 << 20)
    monkeypatch.setattr(drive_speed, "DEPTH_S", 0.01)
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(bytes(6 << 20))
    return paths


def test_each_depth_is_measured(files):
    speed = measure_drive(files, PIECE_BYTES, depths=(1, 4))
    assert list(speed.by_depth) == [1, 4]
    assert speed.gbps == max(speed.by_depth.values()) > 0


def test_a_slow_drive_is_not_read_for_long(files, monkeypatch):
    monkeypatch.setattr(drive_speed, "LONGEST_S", 0.0)
    assert list(measure_drive(files, PIECE_BYTES, depths=(1, 4)).by_depth) == [1]


def test_small_files_are_not_measured(files):
    assert measure_drive(files[:1], PIECE_BYTES) is None
    assert measure_drive([], PIECE_BYTES) is None


def test_a_file_that_cannot_be_read_is_named(files, monkeypatch):
    class Broken(drive_speed._kernels.Reader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.inject(str(files[0].parent), "error", 5)

    monkeypatch.setattr(drive_speed._kernels, "Reader", Broken)
    with pytest.raises(CheckpointError, match=str(files[0].parent)):
        measure_drive(files, PIECE_BYTES)


def test_the_smallest_depth_that_reaches_nearly_all_is_chosen():
    speed = DriveSpeed({1: 1.0, 2: 2.8, 4: 2.97, 8: 3.0, 16: 2.9}, direct=True)
    assert (speed.gbps, speed.depth) == (3.0, 4)
    assert speed.figures() == {
        "gbps": 3.0, "depth": 4, "depth_1_gbps": 1.0, "depth_2_gbps": 2.8, "depth_4_gbps": 2.97,
        "depth_8_gbps": 3.0, "depth_16_gbps": 2.9,
    }  # fmt: skip
