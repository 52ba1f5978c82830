"""Other ways to run experts that do not fit RAM, for `nvme.py`: mapped files, and accelerate's disk offload.

Both compute with moebox's own kernels from the same INT4 bytes, and both may keep as many experts in the page
cache as moebox has rows: beyond that the least recently used are dropped from it, as the kernel would do
where memory is short.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import dispatch_model
from torch import Tensor, nn

from moebox.config import ModelConfig
from moebox.kernels import cpu
from moebox.offload.checkpoint.locate import find_experts
from moebox.offload.checkpoint.safetensors import Checkpoint, TensorInfo, map_bytes, open_tensor
from moebox.offload.experts import group_by_expert
from moebox.quantize.page_cache import drop_cache, drop_mapped

PARTS = ("gate_packed", "gate_scale", "up_packed", "up_scale", "down_packed", "down_scale")


READ_AROUND_BYTES = 512 << 10
"""Bytes that the system may read before and behind a page that is touched."""


class PageCache:
    """Keeps at most `limit` experts in the page cache; a key is `moe * E + expert`.

    Attributes:
        seconds: that this took; the system would do it by itself.
    """

    def __init__(self, tensors: Sequence[Sequence[TensorInfo]], limit: int) -> None:
        self._tensors, self._limit = tensors, limit
        self._recent: OrderedDict[int, None] = OrderedDict()
        expert_bytes = sum(info.nbytes for info in tensors[0])
        self._neighbours = READ_AROUND_BYTES // expert_bytes
        self.seconds = 0.0

    def drop_all(self) -> None:
        """Drop every expert from the page cache."""
        for key in range(len(self._tensors)):
            self._drop(key)
        self._recent.clear()

    def used(self, keys: Sequence[int]) -> None:
        """These experts were just read, and perhaps some of their neighbours in the file."""
        began_s = time.perf_counter()
        near: set[int] = set()
        for key in keys:
            if key not in self._recent:
                near.update(range(key - self._neighbours, key + self._neighbours + 1))
            self._recent[key] = None
            self._recent.move_to_end(key)
        while len(self._recent) > self._limit:
            near.add(self._recent.popitem(last=False)[0])
        for key in near.intersection(range(len(self._tensors))).difference(self._recent):
            self._drop(key)
        self.seconds += time.perf_counter() - began_s

    def _drop(self, key: int) -> None:
        for info in self._tensors[key]:
            drop_mapped(map_bytes(info).ctypes.data, info.nbytes)
            drop_cache(info.file, info.offset, info.nbytes)


class Baseline:
    """Implements `Experts.forward` with bytes that come through the page cache."""

    def __init__(self, checkpoint: Checkpoint, pool: cpu.ThreadPool, limit: int) -> None:
        self.config: ModelConfig = checkpoint.config
        self.nbytes = self.config.experts_bytes
        self.tensors = [infos for layer in find_experts(checkpoint).values() for infos in layer]
        self.pool = pool
        self.cache = PageCache(self.tensors, limit)
        self.cache.drop_all()

    def warm(self, keys: Sequence[int]) -> None:
        """Read experts into the page cache, as moebox reads some into its rows while it loads."""
        for key in keys:
            for info in self.tensors[key]:
                map_bytes(info)[:: 1 << 12].max(initial=0)
            self.cache.used([key])

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, as `Experts.forward` defines it."""
        chosen, offsets, tokens, order = group_by_expert(expert_ids.numpy())
        first = (layer - self.config.first_k_dense_replace) * self.config.n_routed_experts
        keys = [first + expert for expert in chosen]
        out = torch.zeros(hidden.shape, dtype=torch.float32)
        sorted_weights = weights.numpy().reshape(-1)[order]
        self.compute(keys, offsets, tokens, sorted_weights, hidden.contiguous(), out)
        self.cache.used(keys)
        return out

    def compute(
        self,
        keys: Sequence[int],
        offsets: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Add the experts' outputs to `out`, as `cpu.experts_forward`."""
        raise NotImplementedError


class MappedExperts(Baseline):
    """The kernel reads mapped shards; the system reads each page when it is touched."""

    def __init__(self, checkpoint: Checkpoint, pool: cpu.ThreadPool, limit: int) -> None:
        super().__init__(checkpoint, pool, limit)
        self._experts = [cpu.Expert(*map(open_tensor, infos)) for infos in self.tensors]

    def compute(
        self,
        keys: Sequence[int],
        offsets: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Add the experts' outputs in one call of the kernel, as if they were in RAM."""
        experts = [self._experts[key] for key in keys]
        cpu.experts_forward(self.pool, experts, offsets, tokens, weights, hidden, out)


class _Expert(nn.Module):
    """Six weights, which accelerate's hooks load before each call and drop after it."""

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        super().__init__()
        dtypes = {"I32": torch.int32, "BF16": torch.bfloat16}
        for part, info in zip(PARTS, infos, strict=True):
            empty = torch.empty(info.shape, dtype=dtypes[info.dtype], device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))

    def forward(
        self, pool: cpu.ThreadPool, tokens: np.ndarray, weights: np.ndarray, hidden: Tensor, out: Tensor
    ) -> None:
        """Add the expert's output for `tokens` to `out`."""
        expert = cpu.Expert(*(getattr(self, part).data for part in PARTS))
        offsets = np.array([0, len(tokens)], np.int32)
        cpu.experts_forward(pool, [expert], offsets, tokens, weights, hidden, out)


class AcceleratedExperts(Baseline):
    """One module per expert, with accelerate's hooks, which read the checkpoint's own shards."""

    def __init__(self, checkpoint: Checkpoint, pool: cpu.ThreadPool, limit: int) -> None:
        super().__init__(checkpoint, pool, limit)
        index = {
            f"{key}.{part}": {"safetensors_file": str(info.file), "weight_name": info.name}
            for key, infos in enumerate(self.tensors)
            for part, info in zip(PARTS, infos, strict=True)
        }
        modules = nn.ModuleList(_Expert(infos) for infos in self.tensors)
        self._experts = dispatch_model(
            modules, {"": "disk"}, main_device="cpu", offload_index=index, force_hooks=True
        )

    def compute(
        self,
        keys: Sequence[int],
        offsets: np.ndarray,
        tokens: np.ndarray,
        weights: np.ndarray,
        hidden: Tensor,
        out: Tensor,
    ) -> None:
        """Add the experts' outputs one by one, so that only one expert is in memory."""
        for position, key in enumerate(keys):
            mine = slice(int(offsets[position]), int(offsets[position + 1]))
            self._experts[key](self.pool, tokens[mine], weights[mine], hidden, out)
