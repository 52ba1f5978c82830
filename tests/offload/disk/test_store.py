"""The store reads what the checkpoint holds, from one folder or several, and compares checksums."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.runtime import load_tensors, make_checkpoint
from moebox.errors import CheckpointError
from moebox.offload.checkpoint.layout import EXPERT_TENSORS
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.disk import store as store_module
from moebox.offload.disk.store import ExpertStore
from moebox.offload.machine.drive_speed import DriveSpeed
from moebox.offload.machine.profile import MachineProfile
from moebox.quantize.check.inspect import inspect
from moebox.quantize.convert import quantize

SHM = Path("/dev/shm")


@pytest.fixture(autouse=True)
def data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A checkpoint whose experts' six tensors do not lie one behind the other."""
    return make_checkpoint(tmp_path_factory.mktemp("store") / "model")


@pytest.fixture(scope="module")
def own(foreign):
    """The same experts in moebox's layout, in several shards."""
    target = foreign.parent / "int4"
    quantize(foreign, target, shard_bytes=60_000)
    return target


@pytest.fixture
def copy(own, tmp_path):
    """A copy of the folder, for a test to damage."""
    return Path(shutil.copytree(own, tmp_path / "copy"))


@pytest.fixture
def other_drive(tmp_path):
    folder = SHM / f"moebox-{tmp_path.name}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def expert_bytes(folder: Path) -> list[bytes]:
    """Each key's bytes, by the safetensors library."""
    config, tensors = Checkpoint.open(folder).config, load_tensors(folder)
    names = [config.expert_name(*place) for place in config_places(config)]
    return [
        b"".join(tensors[f"{name}.{suffix}"].flatten().view(torch.uint8).numpy() for suffix in EXPERT_TENSORS)
        for name in names
    ]


def config_places(config):
    return [(layer, expert) for layer in config.moe_layers for expert in range(config.n_routed_experts)]


def read_all(store: ExpertStore) -> list[bytes]:
    rows = np.zeros((store.n_keys, store.expert_bytes), np.uint8)
    tickets = [store.submit(key, row, prefetch=key % 2 == 0) for key, row in enumerate(rows)]
    for ticket in tickets:
        store.wait(ticket)
    return [row.tobytes() for row in rows]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def expert_shards(folder: Path) -> list[Path]:
    return [shard for shard in shards(folder) if b".experts." in shard.read_bytes()]


@pytest.mark.parametrize("layout", ["foreign", "own"])
@pytest.mark.parametrize("direct", [True, False])
def test_reads_what_the_checkpoint_holds(layout, direct, request, foreign):
    folder = request.getfixturevalue(layout)
    with ExpertStore.open(Checkpoint.open(folder), direct=direct) as store:
        assert read_all(store) == expert_bytes(foreign)
        assert [len(store.runs(key)) for key in range(store.n_keys)] == (
            [1 if layout == "own" else 6] * store.n_keys
        )
        traffic = store.traffic()
        assert traffic.nbytes == store.n_keys * store.expert_bytes
        assert traffic.busy_s > 0


def test_a_source_for_several_threads(own):
    with ExpertStore.open(Checkpoint.open(own), depth=2) as store:
        keys = store.in_order(range(store.n_keys - 1, -1, -1))
        assert keys == sorted(keys, key=lambda key: store.runs(key)[0])
        rows = np.zeros((store.n_keys, store.expert_bytes), np.uint8)
        with ThreadPoolExecutor(4) as executor:
            list(executor.map(lambda key: store.read(key, rows[key]), keys))
        assert [row.tobytes() for row in rows] == expert_bytes(own)


def test_tickets(own):
    with ExpertStore.open(Checkpoint.open(own), depth=1) as store:
        store.reader.inject("", "delay", 50_000)
        rows = np.zeros((6, store.expert_bytes), np.uint8)
        tickets = [store.submit(key, row, prefetch=True) for key, row in enumerate(rows)]
        store.promote(tickets[5])
        store.wait(tickets[5])
        assert not store.ready(tickets[4])
        for ticket in tickets[1:5]:
            assert store.cancel(ticket) in (0, store.expert_bytes)
        store.wait(tickets[0])
        with pytest.raises(ValueError, match="ticket"):
            store.wait(tickets[0])
        store.submit(4, rows[1])
    rows[1] = 7  # closing has ended the read
    assert (rows[1] == 7).all()


def test_a_row_of_the_wrong_size(own):
    with (
        ExpertStore.open(Checkpoint.open(own)) as store,
        pytest.raises(ValueError, match="target"),
    ):
        store.submit(0, np.zeros(store.expert_bytes + 1, np.uint8))


def test_shards_striped_over_two_drives(own, copy, other_drive):
    for shard in shards(copy)[::2]:
        shutil.move(shard, other_drive)
    checkpoint = Checkpoint.open(copy, stores=[other_drive])
    with ExpertStore.open(checkpoint) as store:
        assert read_all(store) == expert_bytes(own)
        assert len(store.traffic().drives) == 2
        assert all(drive.nbytes for drive in store.traffic().drives)
    with pytest.raises(CheckpointError, match="no such file"):
        Checkpoint.open(copy)
    with pytest.raises(CheckpointError, match=r"no such file, nor in any --store"):
        Checkpoint.open(copy, stores=[copy.parent])
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        Checkpoint.open(copy, stores=[copy.parent / "nowhere"])


def test_copies_on_two_drives(own, other_drive):
    for shard in shards(own):
        shutil.copy(shard, other_drive)
    checkpoint = Checkpoint.open(own)
    with ExpertStore.open(checkpoint, [other_drive], depth=1) as store:
        store.reader.inject("", "delay", 2_000)
        assert read_all(store) == expert_bytes(own)
        assert all(drive.nbytes for drive in store.traffic().drives)
    with ExpertStore.open(Checkpoint.open(own, [other_drive])) as store:
        assert {path.parent for paths in store.drives.values() for path in paths} == {own, other_drive}


def test_copies_must_be_of_the_same_size_and_header(own, tmp_path):
    shard = expert_shards(own)[0]
    other = tmp_path / shard.name
    other.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=f"{other}: differs from {shard} in its size or header"):
        Checkpoint.open(own, [tmp_path])
    other.write_bytes(shard.read_bytes().replace(b"experts.0.", b"experts.1.", 1))
    with pytest.raises(CheckpointError, match="differs from"):
        Checkpoint.open(own, [tmp_path])


def test_one_warning_says_that_a_drive_refuses_direct_reads(own, monkeypatch, caplog):
    class Refused(store_module._kernels.Reader):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.inject("", "refuse_direct")

    monkeypatch.setattr(store_module._kernels, "Reader", Refused)
    with ExpertStore.open(Checkpoint.open(own), depth=2) as store:
        assert read_all(store) == expert_bytes(own)
    assert len(caplog.records) == 1
    assert "O_DIRECT is refused here" in caplog.text
    caplog.clear()
    ExpertStore.open(Checkpoint.open(own), depth=2, direct=False)
    assert not caplog.records


def test_checksums_are_checked_with_each_read(copy):
    with ExpertStore.open(Checkpoint.open(copy), verify=True) as store:
        assert read_all(store) == expert_bytes(copy)
    with ExpertStore.open(Checkpoint.open(copy)) as store:
        file, offset, nbytes = store.runs(5)[0]
    shard = expert_shards(copy)[file]
    with shard.open("r+b") as opened:
        opened.seek(offset + nbytes - 1)
        byte = opened.read(1)
        opened.seek(offset + nbytes - 1)
        opened.write(bytes([byte[0] ^ 1]))
    with ExpertStore.open(Checkpoint.open(copy), verify=True) as store:
        row = np.zeros(store.expert_bytes, np.uint8)
        store.read(4, row)
        with pytest.raises(
            CheckpointError,
            match=rf"{shard}: model.layers.1.mlp.experts.5: byte {offset}: the checksum differs\n.*--verify",
        ):
            store.read(5, row)
    with pytest.raises(CheckpointError, match="expert at byte"):
        inspect(copy, verify=True)


def test_older_folders_get_checksums(copy):
    path = copy / "moebox.json"
    manifest = json.loads(path.read_text())
    older = json.loads(path.read_text()) | {"format": 1}
    for extents in older["experts"].values():
        for extent in extents:
            del extent["xxh3"]
    path.write_text(json.dumps(older))
    with ExpertStore.open(Checkpoint.open(copy)) as store:
        assert read_all(store) == expert_bytes(copy)
    with pytest.raises(CheckpointError, match=r"no checksums of experts.*\n.*--add-checksums"):
        ExpertStore.open(Checkpoint.open(copy), verify=True)
    assert inspect(copy, add_checksums=True).verified
    assert json.loads(path.read_text()) == manifest
    ExpertStore.open(Checkpoint.open(copy), verify=True)


def test_checksums_are_not_added_to_a_damaged_folder(copy):
    path = copy / "moebox.json"
    before = path.read_bytes()
    shard = shards(copy)[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"{shard}: SHA-256 is"):
        inspect(copy, add_checksums=True)
    assert path.read_bytes() == before


def test_verify_reads_every_copy(copy, other_drive):
    for shard in shards(copy):
        shutil.copy(shard, other_drive)
    assert inspect(copy, verify=True, stores=[other_drive]).verified
    damaged = shards(other_drive)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert inspect(copy, verify=True).verified
    with pytest.raises(CheckpointError, match=f"{damaged}: SHA-256 is"):
        inspect(copy, verify=True, stores=[other_drive])


def test_checksums_of_a_folder_that_moebox_did_not_write(foreign):
    with pytest.raises(CheckpointError, match="no checksums of experts"):
        ExpertStore.open(Checkpoint.open(foreign), verify=True)


def depth(store: ExpertStore) -> int:
    return store.traffic().drives[0].depth


def test_the_depth_is_measured_once(own, monkeypatch, caplog):
    measured = []

    def measure(paths, piece_bytes):
        measured.append(sorted(paths))
        return DriveSpeed({1: 1.0, 4: 2.9, 16: 3.0}, direct=True)

    monkeypatch.setattr(store_module, "measure_drive", measure)
    caplog.set_level(logging.INFO, "moebox")
    for _ in range(2):
        assert depth(ExpertStore.open(Checkpoint.open(own))) == 4
    assert measured == [expert_shards(own)]
    assert "3.00 GB/s with 4 reads under way" in caplog.text
    store = ExpertStore.open(Checkpoint.open(own), depth=3)
    assert depth(store) == 3
    (speed,) = store.measure_depth().values()
    assert speed.depth == 4
    (drive,) = store.drives
    assert MachineProfile.load().find("drive", drive).figures["depth_16_gbps"] == 3.0


@pytest.mark.parametrize("speed", [None, DriveSpeed({1: 1.0, 2: 3.0}, direct=False)])
def test_a_measurement_without_o_direct_is_not_saved(own, monkeypatch, speed):
    monkeypatch.setattr(store_module, "measure_drive", lambda *_: speed)
    store = ExpertStore.open(Checkpoint.open(own))
    assert depth(store) == store_module.DEFAULT_DEPTH
    assert store.measure_depth() == {}
    assert MachineProfile.load().to_dict()["parts"] == []


def test_small_shards_are_read_at_the_default_depth(own):
    assert depth(ExpertStore.open(Checkpoint.open(own))) == store_module.DEFAULT_DEPTH
