"""For tests of the GPU runtime: placements of experts, and the CPU runtime's routing on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from moebox.config import ModelConfig
from moebox.offload.device.registry import open_device
from moebox.offload.memory.ram_slab import row_stride
from moebox.runtime.engine.gpu_plan import least_vram_bytes
from moebox.runtime.engine.plan_parts import learned_bytes

DEVICES = ["stand-in", pytest.param("cuda", marks=pytest.mark.gpu)]


def need(device: str) -> str:
    """`device`; skips the test where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@dataclass(frozen=True)
class Placement:
    """Shares of all experts that fit on the GPU and in RAM; or a number of slots instead of `gpu`."""

    gpu: float
    ram: float = 1.0
    slots: int = 0

    def budgets(self, config: ModelConfig, context: int) -> dict[str, int]:
        """`vram` and `ram` of `Engine.load`."""
        stride, keys = row_stride(config), config.n_keys
        slots = self.slots or int(self.gpu * keys)
        return {
            "vram": least_vram_bytes(config, context) + slots * stride,
            "ram": int(self.ram * keys) * stride + learned_bytes(config, 2 if self.ram < 1 else 1),
        }


PLACEMENTS = {
    "all-cpu": Placement(0.0),
    "all-gpu": Placement(1.0),
    "mixed": Placement(0.3),
    "thrashing": Placement(0.0, slots=4),
    "exclusive": Placement(0.6, ram=0.5),
    "cold": Placement(0.15, ram=0.35),
    "cold-most": Placement(0.1, ram=0.2),
    "cold-ram": Placement(0.0, ram=0.4),
    "cold-thrashing": Placement(0.0, ram=0.3, slots=4),
    "cold-few-rows": Placement(0.5, ram=0.045),
}


class ForcedRouting:
    """A device's operations, but with given experts instead of the router's. It computes their weights.

    In bf16 a router sometimes decides near-ties differently. With the same experts on both sides, only the
    arithmetic can differ.

    Attributes:
        chosen: for each MoE layer, int64 [T, k]: the experts of all tokens of the sequence.
    """

    def __init__(self, ops, config: ModelConfig, device: torch.device, chosen: list[torch.Tensor]) -> None:
        self._ops = ops
        self._config = config
        self.chosen = [ids.to(device) for ids in chosen]
        self._now = torch.zeros(len(chosen), config.num_experts_per_tok, dtype=torch.int32, device=device)
        self._calls = 0
        self._done = 0

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def start(self, position: int) -> None:
        """Prepare the next pass, which begins at this position."""
        self._done = position
        now = torch.stack([ids[min(position, len(ids) - 1)] for ids in self.chosen])
        self._now.copy_(now)
        self._calls = 0

    def _layer(self) -> int:
        self._calls += 1
        return (self._calls - 1) % len(self.chosen)

    def _weigh(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        weights = logits.sigmoid().gather(-1, ids)
        return weights / weights.sum(-1, keepdim=True) * self._config.routed_scaling_factor

    def route(self, logits, bias, spec):
        layer = self._layer()
        ids = self.chosen[layer][self._done : self._done + len(logits)]
        if layer == len(self.chosen) - 1:
            self._done += len(logits)
        return ids, self._weigh(logits, ids)

    def route_and_post(self, logits, bias, spec, hidden, *box):
        ids = self._now[self._layer()]
        self._ops.post(ids, self._weigh(logits, ids.long()), hidden, *box)


@pytest.fixture
def forced(monkeypatch, request) -> Iterator[list[ForcedRouting]]:
    """Make devices that the test opens route as the fixture `routed` says; the list has their operations."""
    config, chosen = request.getfixturevalue("routed")
    made: list[ForcedRouting] = []

    def open_forced(name):
        device = open_device(name)
        device.ops = ForcedRouting(device.ops, config, device.torch_device, chosen)
        made.append(device.ops)
        return device

    monkeypatch.setattr("moebox.runtime.engine.gpu_runner.open_device", open_forced)
    yield made
