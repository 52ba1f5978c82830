"""The runner of a box with a GPU: torch's modules compute a prompt, a captured program each decoded token."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError, RequestError
from moebox.kernels import cpu
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.device.base import Device, Launch
from moebox.offload.device.registry import open_device
from moebox.offload.disk.store import ExpertStore
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.machine.hardware import available_ram_bytes
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.traffic import Traffic
from moebox.runtime.engine.decode_program import DecodeProgram
from moebox.runtime.engine.gpu_plan import GpuPlan, plan_gpu_memory
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.engine.recording import open_recording
from moebox.runtime.engine.resources import Resources
from moebox.runtime.model.compute import GpuProcessor
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.loader import load_backbone
from moebox.units import gib

log = logging.getLogger("moebox")

CORES_FOR_UPLOADS = 1
"""Cores that the experts' pool leaves free by default: its threads spin, and the thread that queues uploads
needs a core."""
SMALLEST_RETRY_TOKENS = 8
"""The smallest chunk that is tried where GPU memory is short."""
LOGITS_ROWS = 256
"""Tokens whose logits are computed at once: 160 MiB of fp32 at K2's vocabulary."""


class GpuRunner:
    """Implements `Runner` with backbone and caches on a device, and experts on device, RAM and drive.

    Args:
        model: bf16 on the device; it is connected to `experts` here.
        device: the GPU, or its stand-in.
        experts: the experts on all tiers.
        memory: memory of the first cache; once that cache is dropped, the next one gets it.
        chunk_tokens: tokens that go through the model at once.
        resources: closed with the runner.
    """

    def __init__(
        self,
        model: KimiK2,
        device: Device,
        experts: GpuExperts,
        memory: CacheMemory,
        chunk_tokens: int,
        resources: Resources | None = None,
    ) -> None:
        model.connect(experts)
        self.model = model
        self.dtype = torch.bfloat16
        self.chunk_tokens = chunk_tokens
        self.experts = experts
        self._device = device
        self._rotations = model.model.rotary.tables(memory.capacity)
        self._inputs = device.pinned((2,), torch.int64)
        self._logits = device.pinned((model.config.vocab_size,), torch.float32)
        self._spare = [memory]
        self._resources = resources or Resources()
        self._resources.close_with(self)

    def new_cache(self, context: int) -> KVCache:
        # One cache at a time has the memory that the plan counted; others get memory of their own.
        if not self._spare or self._spare[0].capacity < context:
            return DeviceCache(self.model.config, context, self._allocate(context))
        memory = self._spare.pop()
        cache = DeviceCache(self.model.config, context, memory)
        weakref.finalize(cache, self._spare.append, memory)
        return cache

    def _allocate(self, context: int) -> CacheMemory:
        try:
            return CacheMemory(self.model, self._device, context)
        except torch.OutOfMemoryError:
            free = gib(self._device.free_vram_bytes())
            raise RequestError(
                f"no GPU memory for the cache of another conversation of {context} tokens ({free} are free)",
                "End the other conversation, or ask for a smaller context.",
            ) from None

    def forward(
        self,
        token_ids: list[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        if not isinstance(cache, DeviceCache):
            raise TypeError("the cache was not made by this runner")
        # Torch has little to do on the CPU here; its threads would spin on the cores of the experts' pool.
        torch.set_num_threads(1)
        if len(token_ids) == 1:
            if between_layers is not None:
                between_layers()
            return self.decode(token_ids[0], cache)[None]
        try:
            hidden = self.model(token_ids, cache, between_layers)
        except torch.OutOfMemoryError:
            half = self._halve_chunks(len(token_ids))
        else:
            return self._to_logits(hidden[-1:] if last_only else hidden)
        parts = [token_ids[start : start + half] for start in range(0, len(token_ids), half)]
        logits = [
            self.forward(part, cache, last_only=last_only, between_layers=between_layers) for part in parts
        ]
        return logits[-1] if last_only else torch.cat(logits)

    def _halve_chunks(self, count: int) -> int:
        """Halve the chunk for which memory was short; returns the new number of tokens."""
        if count < 2 * SMALLEST_RETRY_TOKENS:
            free = gib(self._device.free_vram_bytes())
            raise RequestError(
                f"no GPU memory for a chunk of {count} tokens ({free} are free)",
                "Other programs may have taken it; end them, or load the model with a smaller --vram.",
            ) from None
        half = -(-count // 2)
        log.warning("no GPU memory for chunks of %d tokens: going on with %d, which is slower", count, half)
        self.chunk_tokens = min(self.chunk_tokens, half)
        return half

    def _to_logits(self, hidden: Tensor) -> Tensor:
        """`hidden [T, H]` on the device -> fp32 [T, vocab_size] on the CPU."""
        parts = torch.split(hidden, LOGITS_ROWS)
        return torch.cat([self.model.logits(rows).cpu() for rows in parts])

    def decode(self, token: int, cache: DeviceCache) -> Tensor:
        """Run one token through the program, and commit it to the cache: fp32 [vocab_size] on the CPU."""
        self._inputs[0], self._inputs[1] = token, len(cache)  # before compiling, which runs the program
        launch = self._launches(cache.memory)[self.experts.predicting]
        self.experts.begin_token()
        try:
            launch.start()
            self.experts.serve_token()
        except BaseException:
            self._release()
            launch.finish()
            raise
        launch.finish()
        cache.commit([token])
        return self._logits.clone()

    def traffic(self) -> Traffic:
        return self.experts.traffic()

    def close(self) -> None:
        self._resources.close()

    def _release(self) -> None:
        """Let a running program end although its host has stopped, perhaps before the first step."""
        box = self.experts.mailbox
        box.raise_host_flags()
        uploads = self._device.uploads  # the compute stream is waiting and cannot copy
        uploads.copy(box.uploaded, box.summed)
        uploads.record().synchronize()

    def _launches(self, memory: CacheMemory) -> dict[bool, Launch]:
        """The memory's programs, with and without predictions; compiled at its first token."""
        wanted = {False} if self.experts.ahead is None else {False, True}
        for predicts in sorted(wanted - memory.launches.keys()):
            memory.launches[predicts] = self._compile(memory, predicts)
        return memory.launches

    def _compile(self, memory: CacheMemory, predicts: bool) -> Launch:
        box = self.experts.mailbox
        program = DecodeProgram(
            self.model,
            self._device.ops,
            box,
            self.experts.gpu.slab,
            self.experts.ram.slab,
            self._rotations,
            memory.layers,
            self._inputs,
            self._logits,
            predicts,
        )
        box.raise_flags()
        return self._device.compile(program)


class DeviceCache(KVCache):
    """A cache in memory of the device, all of it allocated beforehand."""

    def __init__(self, config: ModelConfig, context: int, memory: CacheMemory) -> None:
        super().__init__(config, torch.bfloat16, context, memory.layers)
        self.memory = memory


class CacheMemory:
    """Device memory for a cache of `capacity` tokens, and the decode programs that were compiled for it."""

    def __init__(self, model: KimiK2, device: Device, capacity: int) -> None:
        config = model.config
        shape = (capacity, config.kv_lora_rank + config.qk_rope_head_dim)
        self.capacity = capacity
        self.layers = [device.empty(shape, torch.bfloat16) for _ in range(config.num_hidden_layers)]
        self.launches: dict[bool, Launch] = {}


def load_on_gpu(name: str, checkpoint: Checkpoint, options: LoadOptions) -> tuple[GpuRunner, GpuPlan]:
    """Load a checkpoint, whose names and formats were checked, onto the device called `name`.

    Raises:
        CheckpointError: a tensor is missing, cannot be read, or does not match the config.
        PlanError: the model does not fit, or the options ask for what a GPU does not do.
    """
    _check_options(name, options)
    device, config = open_device(name), checkpoint.config
    plan = plan_gpu_memory(
        config,
        vram=options.vram,
        free_vram=device.free_vram_bytes(),
        ram=options.ram,
        free_ram=available_ram_bytes(),
        context=options.context,
    )
    try:
        return _load_planned(checkpoint, device, plan, options), plan
    except torch.OutOfMemoryError:
        raise PlanError(
            f"{name} ran out of memory while loading: {gib(device.free_vram_bytes())} are free, "
            f"{gib(plan.fixed_bytes)} were planned beside the experts",
            "Other programs may have taken it; end them, or give a smaller --vram.",
        ) from None


def _load_planned(checkpoint: Checkpoint, device: Device, plan: GpuPlan, options: LoadOptions) -> GpuRunner:
    config = checkpoint.config
    processor = GpuProcessor(device.torch_device, device.ops)
    with Resources() as resources:
        recording = open_recording(checkpoint, options.statistics, options.record_trace)
        resources.add_recording(recording.close)
        store = ExpertStore.open(checkpoint, options.stores, verify=options.verify_reads)
        resources.add(store.close)
        model = load_backbone(checkpoint, torch.bfloat16, "bf16", options.progress, processor)
        # The experts' slab is allocated last, because it shrinks where memory is shorter than planned.
        memory = CacheMemory(model, device, plan.context)
        pool = cpu.ThreadPool(options.threads or max(1, cpu.allowed_cpus() - CORES_FOR_UPLOADS))
        ram = RamSlab(config, plan.ram_rows, device, options.progress)
        experts = GpuExperts.build(device, pool, ram, plan.slots, plan.exclusive, store)
        experts.load(store, recording.statistics, options.progress)
        if options.prefetch:
            experts.upload_ahead()
        recording.connect(experts)
        return GpuRunner(model, device, experts, memory, plan.chunk_tokens, resources)


def _check_options(name: str, options: LoadOptions) -> None:
    if options.backbone != "bf16":
        raise PlanError(
            f"backbone = {options.backbone!r} on {name}: a GPU runs the backbone in bf16",
            "Leave --backbone out, or use --device cpu.",
        )
    if options.dtype not in (None, torch.bfloat16):
        raise PlanError(
            f"dtype = {options.dtype} on {name}: a GPU computes in bf16", "Leave it out, or use the CPU."
        )
