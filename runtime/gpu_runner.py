"""The runner of a GPU: prefill through the modules, decoding through a program captured once per cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError, RequestError
from moebox.kernels import cpu
from moebox.offload.checkpoint import Checkpoint
from moebox.offload.device import Device, Launch, open_device
from moebox.offload.hardware import available_ram_bytes
from moebox.offload.ram import RamTier
from moebox.offload.tiers import TieredExperts
from moebox.runtime.decode_program import DecodeProgram
from moebox.runtime.gpu_memory import GpuPlan, plan_gpu_memory
from moebox.runtime.kv_cache import KVCache
from moebox.runtime.loader import LoadOptions, load_backbone
from moebox.runtime.memory import gib
from moebox.runtime.model import KimiK2
from moebox.runtime.processor import GpuProcessor

CORES_FOR_UPLOADS = 1
"""Left free of the experts' threads by default: spinning on every core starves what queues the uploads."""
LOGITS_ROWS = 256
"""Tokens whose logits are computed at once: 160 MiB of fp32 at K2's vocabulary."""


class GpuRunner:
    """Backbone and caches on the device, experts where `experts` has them. See `Runner`.

    Args:
        model: bf16 on the device, made with its processor; gets its experts here.
        device: where.
        experts: the tiers.
        memory: lent to one session after the other.
        chunk_tokens: tokens that go through the model at once.
    """

    def __init__(
        self, model: KimiK2, device: Device, experts: TieredExperts, memory: CacheMemory, chunk_tokens: int
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

    def new_cache(self, context: int) -> KVCache:
        """See `Runner.new_cache`: the memory that was planned for, or new memory where that is lent."""
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
        """See `Runner.forward`."""
        if not isinstance(cache, DeviceCache):
            raise TypeError("the cache was not made by this runner")
        if len(token_ids) == 1:
            if between_layers is not None:
                between_layers()
            return self.decode(token_ids[0], cache)[None]
        hidden = self.model(token_ids, cache, between_layers)
        return self._to_logits(hidden[-1:] if last_only else hidden)

    def _to_logits(self, hidden: Tensor) -> Tensor:
        """`hidden [T, H]` on the device -> fp32 [T, vocab_size] on the CPU."""
        parts = torch.split(hidden, LOGITS_ROWS)
        return torch.cat([self.model.logits(rows).cpu() for rows in parts])

    def decode(self, token: int, cache: DeviceCache) -> Tensor:
        """Run one token through the program, and commit it to the cache: fp32 [vocab_size] on the CPU."""
        self._inputs[0], self._inputs[1] = token, len(cache)  # compiling runs it too
        launch = self._launch(cache.memory)
        self.experts.begin_token()
        launch.start()
        try:
            self.experts.run_token()
        except BaseException:
            self._release()
            launch.finish()
            raise
        launch.finish()
        cache.commit([token])
        return self._logits.clone()

    def _release(self) -> None:
        """Let a running program end without its host: an interrupt may have come before the first step."""
        box = self.experts.mailbox
        for tensor in (box.hits, box.uploads, box.sums):
            tensor.zero_()
        for flags in (box.listed, box.summed):
            flags.fill_(1)
        self._device.uploads.copy(box.uploaded, box.summed)  # the compute stream waits, and cannot do it

    def _launch(self, memory: CacheMemory) -> Launch:
        """The program for this memory, compiled at its first token."""
        if memory.launch is None:
            box = self.experts.mailbox
            program = DecodeProgram(
                self.model,
                self._device.ops,
                box,
                self.experts.gpu.slab,
                self._rotations,
                memory.layers,
                self._inputs,
                self._logits,
            )
            box.raise_flags()
            memory.launch = self._device.compile(program)
        return memory.launch


class DeviceCache(KVCache):
    """A cache in device memory that is there from the start."""

    def __init__(self, config: ModelConfig, context: int, memory: CacheMemory) -> None:
        super().__init__(config, torch.bfloat16, context, memory.layers)
        self.memory = memory


class CacheMemory:
    """Device memory for the cache of `capacity` tokens, and the decode program made for it."""

    def __init__(self, model: KimiK2, device: Device, capacity: int) -> None:
        config = model.config
        shape = (capacity, config.kv_lora_rank + config.qk_rope_head_dim)
        self.capacity = capacity
        self.layers = [device.empty(shape, torch.bfloat16) for _ in range(config.num_hidden_layers)]
        self.launch: Launch | None = None


def load_on_gpu(name: str, checkpoint: Checkpoint, options: LoadOptions) -> tuple[GpuRunner, GpuPlan]:
    """Load a checkpoint that was checked onto the device called `name`; see `Engine.load`."""
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
    processor = GpuProcessor(device.torch_device, device.ops)
    model = load_backbone(checkpoint, None, torch.bfloat16, "bf16", options.progress, processor)
    pool = cpu.ThreadPool(options.threads or max(1, cpu.allowed_cpus() - CORES_FOR_UPLOADS))
    # The slab comes last: it is what shrinks where memory turns out to be short.
    memory = CacheMemory(model, device, plan.context)
    ram = RamTier(config, plan.ram_rows, device, options.progress)
    experts = TieredExperts.build(config, device, pool, ram, plan.slots, plan.exclusive)
    experts.load(checkpoint, options.progress)
    return GpuRunner(model, device, experts, memory, plan.chunk_tokens), plan


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
