"""Split experts against fp64: Triton's kernels, in its interpreter without a GPU, and the torch reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.experts import dequantize, random_arrays
from moebox.kernels.gpu.reference import experts as experts_reference
from moebox.kernels.gpu.slots import slot_layout
from moebox.kernels.gpu.triton import split_expert
from moebox.kernels.gpu.triton.experts import RowTiles

FINE = 2e-4
K2_SHAPE = (7168, 2048)


@pytest.fixture(params=[split_expert, experts_reference], ids=["triton", "torch"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Any:
    """Both implementations. The interpreter takes 0.2 s a program, so it gets few and large tiles."""
    if device.type == "cpu":
        monkeypatch.setattr(split_expert, "GATE_UP_SPLIT", RowTiles(4, 8))
        monkeypatch.setattr(split_expert, "DOWN_SPLIT", RowTiles(4, 8))
    return request.param


def make_ram(
    shape: tuple[int, int], rows: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, list[list[Tensor]]]:
    """Random experts, pinned if there is a GPU; 256 bytes of NaN scales follow each."""
    arrays = [random_arrays(*shape, generator) for _ in range(rows)]
    nbytes = slot_layout(shape).nbytes
    ram = torch.full((rows, nbytes + 256), 255, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for row, tensors in zip(ram, arrays, strict=True):
        for tensor in tensors[1::2]:
            tensor.view(-1)[::2] *= -1  # scales have both signs
        row[:nbytes] = torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])
    return ram, arrays


def expected_split(arrays: list[Tensor], rows: int, weight: float, hidden: Tensor) -> Tensor:
    """The value that is added to `out`, in fp64."""
    gate, up, down = (dequantize(*arrays[i : i + 2]) for i in (0, 2, 4))
    x = hidden.double()
    inner = torch.nn.functional.silu(gate[:rows] @ x) * (up[:rows] @ x)
    return weight * (down[:, :rows] @ inner)


def run(
    module: Any, ram: Tensor, shape: tuple[int, int], chosen: tuple[int, int], hidden: Tensor, before: Tensor
) -> Tensor:
    """`split_expert` with weight 0.7, added to a copy of `before`."""
    device = torch.device("cuda") if ram.is_pinned() else ram.device
    listed, weight = torch.tensor([*chosen, -7, -7], dtype=torch.int32), torch.tensor([0.7])
    out = before.to(device, copy=True)
    module.split_expert(ram, shape, listed.to(device), weight.to(device), hidden.to(device), out)
    return out.cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, rows",
    [((96, 160), 64), ((96, 160), 160), ((224, 32), 32), ((256, 64), 32), ((64, 1088), 1056)],
    ids=str,
)
def test_split_expert(
    module: Any, shape: tuple[int, int], rows: int, device: torch.device, generator: Any, monkeypatch: Any
) -> None:
    """Odd numbers of groups, in the last case more than a warp has lanes; the kernel adds to `out`."""
    if shape[1] > 1024 and device.type == "cpu":
        monkeypatch.setattr(split_expert, "GATE_UP_SPLIT", RowTiles(1, 32))
    ram, arrays = make_ram(shape, 2, device, generator)
    hidden = torch.randn(shape[0], generator=generator).bfloat16()
    before = torch.randn(shape[0], generator=generator)
    expected = expected_split(arrays[1], rows, 0.7, hidden)
    out = run(module, ram, shape, (1, rows), hidden, before)
    assert (out.double() - before - expected).norm() < FINE * expected.norm()


@pytest.mark.parametrize("chosen", [(-1, 0), (-1, 64), (0, 0)], ids=str)
def test_nothing_to_do(module: Any, chosen: tuple[int, int], device: torch.device, generator: Any) -> None:
    """No row, or none of its inner rows."""
    ram, _ = make_ram((32, 64), 1, device, generator)
    before = torch.randn(32, generator=generator)
    assert torch.equal(run(module, ram, (32, 64), chosen, torch.ones(32).bfloat16(), before), before)


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"ram": torch.zeros(1, 100, dtype=torch.uint8)}, "an expert has 1728 bytes"),
        ({"split": torch.zeros(1, dtype=torch.int32)}, "split is torch.int32"),
        ({"split": torch.zeros(2)}, "split is torch.float32"),
        ({"weight": torch.zeros(2)}, "weight is"),
        ({"hidden": torch.zeros(32)}, "hidden is torch.float32"),
        ({"out": torch.zeros(64)}, "out is"),
    ],
)
def test_refuses(changed: dict[str, Tensor], says: str) -> None:
    """A call that would read beyond a row or misread an array is refused before a kernel is launched."""
    given = {
        "ram": torch.zeros(1, 4096, dtype=torch.uint8),
        "shape": (32, 32),
        "split": torch.zeros(4, dtype=torch.int32),
        "weight": torch.zeros(1),
        "hidden": torch.zeros(32).bfloat16(),
        "out": torch.zeros(32),
    }
    with pytest.raises(ValueError, match=says):
        split_expert.split_expert(**(given | changed))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_k2_in_a_graph(device: torch.device, generator: Any) -> None:
    """The split is in pinned memory, and a captured graph reads it at each replay."""
    ram, arrays = make_ram(K2_SHAPE, 2, device, generator)
    hidden = torch.randn(K2_SHAPE[0], generator=generator).bfloat16()
    listed = torch.tensor([-1, 0, 0, 0], dtype=torch.int32).pin_memory()
    weight, out = torch.tensor([0.7]).pin_memory(), torch.zeros(K2_SHAPE[0], device=device)
    call = (ram, K2_SHAPE, listed, weight, hidden.to(device), out)
    split_expert.split_expert(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        split_expert.split_expert(*call)
    for row, rows in ((0, 32), (1, 1056), (0, 2048), (-1, 2048)):
        listed[:2] = torch.tensor([row, rows])
        out.zero_()
        graph.replay()
        first = out.cpu()
        out.zero_()
        graph.replay()
        assert torch.equal(out.cpu(), first)
        expected = expected_split(arrays[row], rows if row >= 0 else 0, 0.7, hidden)
        assert (first.double() - expected).norm() <= FINE * expected.norm()
