"""Native reads: from any offset of a file to any address, and prefetches behind other reads."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash

from moebox import _kernels

PAGE = 4096
PIECE = 4 * PAGE
SIZE = 40 * PAGE + 777
SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


@pytest.fixture
def path(tmp_path, data):
    file = tmp_path / "file"
    file.write_bytes(data.tobytes())
    return str(file)


@pytest.fixture
def other_drive(data, tmp_path):
    """The same bytes on another device."""
    file = SHM / f"moebox-{tmp_path.name}"
    file.write_bytes(data.tobytes())
    assert file.stat().st_dev != tmp_path.stat().st_dev
    yield str(file)
    file.unlink()


TARGETS: list[np.ndarray] = []


@pytest.fixture(autouse=True)
def targets():
    """Keeps all targets alive until the test's readers are gone, since a target must outlive its read."""
    yield
    TARGETS.clear()


def aligned(nbytes: int, shift: int = 0) -> np.ndarray:
    memory = np.zeros(nbytes + shift + PAGE, np.uint8)
    TARGETS.append(memory)
    first = -memory.ctypes.data % PAGE + shift
    return memory[first : first + nbytes]


def slow(reader, prefix: str = "", **options) -> None:
    """Each read takes 5 ms longer."""
    reader.inject(prefix, "delay", 5_000, **options)


@pytest.mark.parametrize("direct", [True, False])
def test_any_offset_length_and_address(path, data, direct):
    reader = _kernels.Reader(4, PIECE)
    file = reader.add_file([path], direct)
    assert reader.direct(file) == direct
    rng = random.Random(1)
    places = [(0, SIZE), (SIZE - 1, 1), (PAGE, PIECE), (PAGE, PIECE + 5), (0, 10), (8 * PAGE - 3, 6)]
    places += [(begin := rng.randrange(SIZE), rng.randrange(1, SIZE - begin + 1)) for _ in range(100)]
    for offset, nbytes in places:
        for shift in (0, rng.randrange(PAGE)):
            target = aligned(nbytes, shift)
            reader.wait(reader.submit([(file, offset, nbytes)], target))
            assert np.array_equal(target, data[offset : offset + nbytes]), (offset, nbytes, shift)


def test_nothing_beyond_the_target_is_written(path):
    reader = _kernels.Reader(2, PIECE)
    file = reader.add_file([path])
    memory = aligned(8 * PAGE)
    reader.wait(reader.submit([(file, 100, 3 * PAGE + 1)], memory[PAGE : 4 * PAGE + 1]))
    assert not memory[:PAGE].any()
    assert not memory[4 * PAGE + 1 :].any()


def test_runs_of_several_files_land_one_behind_the_other(path, data, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(data[::-1].tobytes())
    reader = _kernels.Reader(3, PIECE)
    files = [reader.add_file([path]), reader.add_file([str(other)])]
    target = aligned(30_000)
    reader.wait(
        reader.submit([(files[0], 5, 10_000), (files[1], 0, 12_000), (files[0], PAGE, 8_000)], target)
    )
    expected = [data[5:10_005], data[::-1][:12_000], data[PAGE : PAGE + 8_000]]
    assert np.array_equal(target, np.concatenate(expected))


def test_many_threads(path, data):
    reader = _kernels.Reader(4, PIECE)
    file = reader.add_file([path])
    reader.inject(path, "delay", 300, count=200)

    def task(seed: int) -> bool:
        rng = random.Random(seed)
        right = True
        for _ in range(40):
            begin = rng.randrange(SIZE - 1)
            target = aligned(rng.randrange(1, SIZE - begin), rng.choice((0, 1)))
            ticket = reader.submit([(file, begin, target.size)], target, rng.random() < 0.5)
            action = rng.randrange(3)
            if action == 0:
                assert 0 <= reader.cancel(ticket) <= target.size
                continue
            if action == 1:
                reader.promote(ticket)
            reader.wait(ticket)
            right = right and np.array_equal(target, data[begin : begin + target.size])
        return right

    with ThreadPoolExecutor(6) as executor:
        assert all(executor.map(task, range(6)))


def test_other_reads_come_before_prefetches(path):
    reader = _kernels.Reader(1, PAGE)
    file = reader.add_file([path])
    slow(reader)
    early, late = aligned(30 * PAGE), aligned(PAGE)
    prefetch = reader.submit([(file, 0, early.size)], early, prefetch=True)
    reader.wait(reader.submit([(file, 0, PAGE)], late))
    assert not reader.ready(prefetch)
    assert sum(nbytes for _, _, nbytes, _ in reader.traffic()) <= early.size // 2
    reader.wait(prefetch)


def test_a_promoted_prefetch_overtakes_the_others(path, data):
    reader = _kernels.Reader(1, PAGE)
    file = reader.add_file([path])
    slow(reader)
    first, second = aligned(30 * PAGE), aligned(2 * PAGE)
    tickets = [reader.submit([(file, 0, target.size)], target, prefetch=True) for target in (first, second)]
    reader.promote(tickets[1])
    reader.wait(tickets[1])
    assert not reader.ready(tickets[0])
    reader.promote(tickets[0])
    reader.promote(tickets[0])
    reader.wait(tickets[0])
    assert np.array_equal(first, data[: first.size])
    assert np.array_equal(second, data[: second.size])


def test_prefetches_leave_half_of_a_drive_to_other_reads(path):
    reader = _kernels.Reader(4, PAGE)
    file = reader.add_file([path])
    reader.inject("", "delay", 100_000)
    prefetch = reader.submit([(file, 0, 30 * PAGE)], aligned(30 * PAGE), prefetch=True)
    reader.wait(reader.submit([(file, 0, 2 * PAGE)], aligned(2 * PAGE)))
    # Two of the first four reads were the prefetch's, and at most two more began while those went on.
    assert sum(nbytes for _, _, nbytes, _ in reader.traffic()) <= 6 * PAGE
    reader.cancel(prefetch)


def test_cancelled_reads_leave_the_target_alone(path, data):
    reader = _kernels.Reader(2, PAGE)
    file = reader.add_file([path])
    slow(reader)
    target = aligned(30 * PAGE)
    ticket = reader.submit([(file, 0, target.size)], target)
    reader.wait(reader.submit([], aligned(0)))
    wasted = reader.cancel(ticket)
    assert wasted < target.size
    assert wasted % PAGE == 0
    target[:] = 7
    reader.wait(reader.submit([(file, 0, PAGE)], aligned(PAGE)))
    assert (target == 7).all()
    done = reader.submit([(file, 0, PAGE)], aligned(PAGE))
    while not reader.ready(done):
        pass
    assert reader.cancel(done) == PAGE


def test_a_reader_may_be_deleted_while_reads_are_under_way(path):
    reader = _kernels.Reader(2, PAGE)
    file = reader.add_file([path])
    slow(reader)
    target = aligned(30 * PAGE)
    reader.submit([(file, 0, target.size)], target)
    del reader
    gc.collect()
    target[:] = 7
    assert (target == 7).all()


def test_copies_on_two_drives_are_read_at_once(path, other_drive, data):
    reader = _kernels.Reader(1, PAGE)
    file = reader.add_file([path, other_drive])
    slow(reader)
    target = aligned(SIZE)
    reader.wait(reader.submit([(file, 0, SIZE)], target))
    assert np.array_equal(target, data)
    shares = [nbytes for _, _, nbytes, _ in reader.traffic()]
    assert len(shares) == 2
    assert sum(shares) == SIZE
    assert min(shares) > SIZE // 5


def test_drives_of_different_speed_share_by_speed(path, other_drive, data):
    reader = _kernels.Reader(1, PAGE)
    file = reader.add_file([path, other_drive])
    reader.inject(path, "delay", 20_000)
    reader.inject(other_drive, "delay", 1_000)
    target = aligned(SIZE)
    reader.wait(reader.submit([(file, 0, SIZE)], target))
    assert np.array_equal(target, data)
    shares = {folder: nbytes for folder, _, nbytes, _ in reader.traffic()}
    assert shares[f"{SHM}/"] > SIZE // 2


def test_depths(path, other_drive):
    reader = _kernels.Reader(2, PAGE)
    file = reader.add_file([path])
    reader.add_file([other_drive])
    reader.set_depth(path, 5)
    assert sorted(depth for _, depth, _, _ in reader.traffic()) == [2, 5]
    reader.wait(reader.submit([(file, 0, PAGE)], aligned(PAGE)))
    with pytest.raises(ValueError, match="depth: 4 given, at least the drive's 5 threads"):
        reader.set_depth(path, 4)
    with pytest.raises(ValueError, match="none of the reader's files"):
        reader.set_depth("elsewhere", 4)


def test_drive_that_refuses_direct_reads(path, data):
    reader = _kernels.Reader(2, PIECE)
    reader.inject(path, "refuse_direct")
    file = reader.add_file([path])
    assert not reader.direct(file)
    target = aligned(SIZE)
    reader.wait(reader.submit([(file, 0, SIZE)], target))
    assert np.array_equal(target, data)


def test_files_that_cannot_be_opened(path, tmp_path):
    reader = _kernels.Reader(2, PIECE)
    with pytest.raises(_kernels.ReadFailure) as missing:
        reader.add_file([str(tmp_path / "none")])
    assert missing.value.args[1:] == ("io", str(tmp_path / "none"), 0, 2)
    (tmp_path / "short").write_bytes(b"short")
    with pytest.raises(_kernels.ReadFailure) as differs:
        reader.add_file([path, str(tmp_path / "short")])
    assert differs.value.args[1:3] == ("changed", str(tmp_path / "short"))


def test_reads_beyond_the_end(path):
    reader = _kernels.Reader(2, PIECE)
    file = reader.add_file([path])
    ticket = reader.submit([(file, SIZE - 10, 20)], aligned(20))
    with pytest.raises(_kernels.ReadFailure, match="ends before it should") as failure:
        reader.wait(ticket)
    assert failure.value.args[1:] == ("short_read", path, SIZE, 0)


def test_wrong_calls(path):
    for arguments, message in (((0, PIECE), "depth_per_drive: 0"), ((1, 5000), "piece_bytes: 5000 given")):
        with pytest.raises(ValueError, match=message):
            _kernels.Reader(*arguments)
    reader = _kernels.Reader(1, PIECE)
    file = reader.add_file([path])
    with pytest.raises(ValueError, match="target"):
        reader.submit([(file, 0, 100)], aligned(99))
    with pytest.raises(TypeError, match="target"):
        reader.submit([(file, 0, 100)], aligned(100).view(np.float32))
    with pytest.raises(ValueError, match="copies: 0 given"):
        reader.add_file([])
    with pytest.raises(IndexError):
        reader.submit([(file + 1, 0, 100)], aligned(100))
    with pytest.raises(ValueError, match="checksum: given for 100 bytes"):
        reader.submit([(file, 0, 100)], aligned(100), checksum=5)
    with pytest.raises(ValueError, match="kind: melt given"):
        reader.inject("", "melt")
    ticket = reader.submit([(file, 0, 100)], aligned(100))
    reader.wait(ticket)
    for call in (reader.wait, reader.ready, reader.promote, reader.cancel):
        with pytest.raises(ValueError, match=f"ticket: {ticket} given, which is over"):
            call(ticket)


@pytest.mark.parametrize("nbytes", [241, 255, 256, 257, 1023, 1024, 1025, 1088, 2048, 100_003])
def test_xxh3_is_the_reference_implementations(nbytes):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    assert _kernels.xxh3_64(data) == xxhash.xxh3_64_intdigest(data.tobytes())


def test_xxh3_of_few_bytes_is_refused():
    with pytest.raises(ValueError, match="data: 240 bytes given, at least 241"):
        _kernels.xxh3_64(np.zeros(240, np.uint8))


def test_checksums_are_compared(path, data):
    reader = _kernels.Reader(3, PAGE)
    file = reader.add_file([path])
    right = xxhash.xxh3_64_intdigest(data[10:50_010].tobytes())
    reader.wait(reader.submit([(file, 10, 50_000)], aligned(50_000), checksum=right))
    with pytest.raises(_kernels.ReadFailure, match="the checksum differs") as failure:
        reader.wait(reader.submit([(file, 10, 50_000)], aligned(50_000), checksum=right ^ 1))
    assert failure.value.args[1:4] == ("checksum", path, 10)
