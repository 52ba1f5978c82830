"""Rows hold an expert's bytes, from either layout on disk; too little memory is an error."""

import numpy as np
import pytest
import torch

from helpers.offload.tiers import TOP_K, all_bytes, small_config
from helpers.runtime import load_tensors, make_checkpoint
from moebox.errors import CheckpointError, PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint.layout import EXPERT_TENSORS
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.device.stand_in import StandInDevice
from moebox.offload.disk.store import ExpertStore
from moebox.offload.memory import ram_slab as ram_module
from moebox.offload.memory.ram_slab import RamSlab, row_tensors
from moebox.quantize.convert import quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose experts' six tensors do not lie one behind the other."""
    return make_checkpoint(tmp_path_factory.mktemp("ram") / "model")


@pytest.fixture(scope="module")
def own(folder):
    """The same experts in moebox's layout."""
    target = folder.parent / "int4"
    quantize(folder, target)
    return target


@pytest.mark.parametrize("layout", ["folder", "own"])
def test_rows_are_what_the_checkpoint_holds(layout, request, folder):
    checkpoint = Checkpoint.open(request.getfixturevalue(layout))
    config = checkpoint.config
    ram = RamSlab(config)
    calls = []
    with ExpertStore.open(checkpoint) as store:
        ram.fill(store, progress=lambda *call: calls.append(call))
        assert len(store.runs(0)) == (1 if layout == "own" else 6)
    tensors = load_tensors(folder)
    for key in range(ram.n_keys):
        layer, expert = divmod(key, config.n_routed_experts)
        name = config.expert_name(config.moe_layers[layer], expert)
        views = row_tensors(ram.slab[ram.rows[key]], ram.layout)
        for suffix, view in zip(EXPERT_TENSORS, views, strict=True):
            assert torch.equal(view, tensors[f"{name}.{suffix}"])
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert calls[-1] == ("experts", config.experts_bytes, config.experts_bytes)


def test_some_keys_in_few_rows(own):
    checkpoint = Checkpoint.open(own)
    whole, part = RamSlab(checkpoint.config), RamSlab(checkpoint.config, n_rows=5)
    with ExpertStore.open(checkpoint) as store:
        whole.fill(store)
        for keys in ([3, 9], [15, 0, 7, 2, 11]):
            part.fill(store, keys)
            assert part.rows[keys].tolist() == list(range(len(keys)))
            assert (part.rows >= 0).sum() == len(keys)
            for key in keys:
                assert torch.equal(part.slab[part.rows[key]], whole.slab[whole.rows[key]])
        with pytest.raises(ValueError, match="6 experts for 5 rows"):
            part.fill(store, range(6))


def test_a_file_that_shrank(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    checkpoint = Checkpoint.open(tmp_path)
    shard = max(tmp_path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    with ExpertStore.open(checkpoint) as store:
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        with pytest.raises(CheckpointError, match=rf"{shard.name}: model.*experts.*: byte \d+"):
            RamSlab(checkpoint.config).fill(store)


def test_pinned_in_pieces_of_whole_rows(monkeypatch):
    device, pieces, unpinned = StandInDevice(), [], []

    def pin(memory):
        pieces.append(memory)
        return lambda: unpinned.append(memory)

    monkeypatch.setattr(device, "pin", pin)
    config = small_config()
    monkeypatch.setattr(ram_module, "PIN_BYTES", 5 * ram_module.row_stride(config) + 17)
    ram = RamSlab(config, 13, device)
    assert [len(piece) for piece in pieces] == [5, 5, 3]
    assert all(piece.data_ptr() % ram_module.PAGE_BYTES == 0 for piece in pieces)
    assert pieces[0].data_ptr() == ram.slab.data_ptr()
    ram.close()
    assert len(unpinned) == 3


def test_pinning_that_is_refused_unpins_the_rest(monkeypatch):
    device, unpinned = StandInDevice(), []
    answers = iter([lambda: unpinned.append(1), None])

    def pin(_):
        if (answer := next(answers)) is None:
            raise PlanError("no more")
        return answer

    monkeypatch.setattr(device, "pin", pin)
    monkeypatch.setattr(ram_module, "PIN_BYTES", ram_module.PAGE_BYTES)
    with pytest.raises(PlanError, match="no more"):
        RamSlab(small_config(), 3, device)
    assert unpinned == [1]


def test_more_memory_than_there_is():
    with pytest.raises(PlanError, match=r"bytes of RAM for experts: .*\n.*--ram"):
        RamSlab(small_config(), n_rows=1 << 45)


def test_synthetic_experts_differ_and_repeat():
    config = small_config()
    some, all_keys = RamSlab(config, 3), RamSlab(config)
    all_keys.fill_synthetic()
    some.fill_synthetic(keys=[40, 7])
    for key in (40, 7):
        assert torch.equal(some.slab[some.rows[key]], all_keys.slab[all_keys.rows[key]])
    nbytes = config.expert_bytes
    rows = {bytes(row[:nbytes].numpy()) for row in all_keys.slab}
    assert len(rows) == all_keys.n_keys
    some.fill_synthetic(seed=1, keys=[40])
    assert not torch.equal(some.slab[0, :nbytes], all_bytes(config)[40])


def test_synthetic_outputs_are_of_normal_size():
    config = small_config(hidden_size=256, moe_intermediate_size=128, n_routed_experts=2 * TOP_K)
    ram = RamSlab(config)
    ram.fill_synthetic()
    hidden, out = torch.randn(50, 256), torch.zeros(50, 256)
    cpu.experts_forward(
        cpu.ThreadPool(1), [ram.expert(0)], np.array([0, 50], np.int32), np.arange(50, dtype=np.int32),
        np.ones(50, np.float32), hidden, out,
    )  # fmt: skip
    assert 0.05 < float(out.std()) < 5
