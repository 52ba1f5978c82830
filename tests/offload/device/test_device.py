"""Copies keep their order, errors are reported, memory is counted: on the stand-in and, if present, CUDA."""

import gc
import threading

import pytest
import torch

from moebox.errors import DeviceError, PlanError
from moebox.offload.decode.mailbox import Mailbox
from moebox.offload.device.cuda import CudaDevice
from moebox.offload.device.registry import open_device
from moebox.offload.device.stand_in import StandInDevice

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["stand-in", CUDA])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return open_device(request.param)


def test_copies_are_done_in_order(device):
    target = device.empty((50,), torch.int32)
    values = [device.pinned((50,), torch.int32).fill_(value) for value in range(20)]
    device.uploads.copy_all([(target, value) for value in values])
    event = device.uploads.record()
    back = device.pinned((50,), torch.int32)
    device.downloads.wait(event)
    device.downloads.copy(back, target)
    end = device.downloads.record()
    end.synchronize()
    assert event.done()
    assert (back == 19).all()
    assert event.seconds_since(event) == 0.0


def test_compute_waits_for_copies_and_copies_for_compute(device):
    slot = device.empty((1 << 16,), torch.float32)
    first, second = (device.pinned((1 << 16,), torch.float32).fill_(value) for value in (1.0, 2.0))
    sums = []
    for value in (first, second):
        device.uploads.copy(slot, value)
        device.compute_waits(device.uploads.record())
        sums.append(slot.sum())
        device.uploads.wait(device.mark())
    device.synchronize()
    assert [float(value) for value in sums] == [1 << 16, 2 << 16]


def test_send_and_fetch(device):
    source = device.pinned((3, 5), torch.bfloat16).fill_(2.5)
    there = device.send(source)
    assert there.device.type == device.torch_device.type
    back = device.pinned((3, 5), torch.bfloat16)
    device.fetch(back, there * 2)
    device.mark().synchronize()
    assert (back == 5.0).all()


def test_a_program_runs_again_and_again(device):
    x = device.empty((4,), torch.float32).zero_()
    launch = device.compile(lambda: x.add_(1))
    started = float(x[0])  # compiling may run it
    for _ in range(3):
        launch.start()
        launch.finish()
    assert float(x[0]) == started + 3


def test_mailbox_lets_a_program_run_alone(device):
    box = Mailbox.allocate(device, layers=2, top_k=4, hidden_size=64)
    assert box.resident_slots.shape == (2, 5)
    assert box.uploaded.device.type == device.torch_device.type
    assert int(box.one[0]) == 1
    assert not any(int(flags.sum()) for flags in (box.routed, box.listed, box.uploaded, box.summed))
    assert (box.split_expert[:, 0] == -1).all()
    box.split_expert.fill_(32)
    box.raise_flags()
    assert (box.split_expert[:, 0] == -1).all()
    for flags in (box.listed, box.uploaded, box.summed):
        device.ops.wait(flags[1])  # would not return otherwise
    device.synchronize()


def test_a_program_inherits_inference_mode_and_raises():
    device = StandInDevice()
    with torch.inference_mode():
        x = torch.zeros(1)
        launch = device.compile(lambda: x.add_(1))
        launch.start()
        launch.finish()
    assert x.item() == 1

    def fail():
        raise ValueError("in the program")

    launch = device.compile(fail)
    launch.start()
    with pytest.raises(ValueError, match="in the program"):
        launch.finish()


def test_a_failed_copy_raises_where_the_host_waits():
    device = StandInDevice()
    device.uploads.copy(torch.empty(3), torch.empty(4))
    event = device.uploads.record()
    with pytest.raises(DeviceError, match="copy failed"):
        event.synchronize()
    with pytest.raises(DeviceError, match="copy failed"):
        device.synchronize()


@pytest.mark.slow
def test_stand_in_memory_is_counted():
    device = StandInDevice(vram_bytes=1000)
    first = device.empty((100,), torch.float32)
    assert device.free_vram_bytes() == 600
    with pytest.raises(torch.OutOfMemoryError):
        device.empty((601,), torch.uint8)
    view = first[:1]
    del first
    gc.collect()
    assert device.free_vram_bytes() == 600  # the view holds it
    del view
    gc.collect()
    assert device.free_vram_bytes() == 1000


def test_threads_end_with_the_device():
    before = set(threading.enumerate())  # threads of an earlier test may end meanwhile
    device = StandInDevice()
    copiers = [thread for thread in threading.enumerate() if thread not in before]
    assert len(copiers) == 2
    assert all(thread.name.startswith("moebox-copy") for thread in copiers)
    del device
    gc.collect()
    for thread in copiers:
        thread.join(10)
    assert not any(thread.is_alive() for thread in copiers)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:99", "cpu"])
def test_no_such_device(name):
    with pytest.raises(PlanError, match=name):
        open_device(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_memory_is_copied_beside_the_host():
    device = CudaDevice()
    memory = torch.zeros(1 << 24, dtype=torch.uint8)
    offset = -memory.data_ptr() % 4096
    page = memory[offset : offset + (1 << 23)]
    unpin = device.pin(page)
    target = device.empty((1 << 23,), torch.uint8)
    device.uploads.copy(target, page.fill_(7))
    device.uploads.record().synchronize()
    assert (target == 7).all()
    unpin()


class ForeignEvent:
    """An event of another kind of device."""

    def done(self):
        return True

    def synchronize(self):
        pass

    def seconds_since(self, _earlier):
        return 0.0


def test_events_of_another_device_are_refused(device):
    with pytest.raises(TypeError, match=r"event: ForeignEvent given, an event of a .* device needed"):
        device.mark().seconds_since(ForeignEvent())


def test_a_program_that_was_not_started_cannot_finish():
    with pytest.raises(RuntimeError, match=r"finish\(\) before start\(\)"):
        StandInDevice().compile(lambda: None).finish()
