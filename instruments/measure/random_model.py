"""A model of random weights with the shape of a real one, made in memory to measure a box without a
checkpoint.

Random weights cost as much time as trained ones. Only the routing differs, so that a benchmark routes them by
a trace (`offload/routing/trace.py`). The shapes are those of `moebox synth`.
"""

from __future__ import annotations

import math

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from moebox.config import ModelConfig, parse_config
from moebox.kernels import cpu
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.memory.ram_slab import RamSlab
from moebox.quantize.synth import Shape
from moebox.quantize.synth.shapes import synth_config
from moebox.runtime.model.base import Processor
from moebox.runtime.model.compute import CPU
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.precision import keeps_fp32

BLOCK = (1 << 22) - 3
"""Random elements that a large matrix repeats; no power of two, as widths often are, so that rows differ."""


def shape_config(shape: Shape, layers: int | None = None) -> ModelConfig:
    """The config of a shape at its own depth, or with `layers` layers, dense layers included.

    Raises:
        ConfigError: so few layers would include none with experts.
    """
    return parse_config(synth_config(shape, layers=layers, format="int4"), f"shape {shape}")


def synthetic_model(
    config: ModelConfig,
    dtype: torch.dtype,
    processor: Processor = CPU,
    seed: int = 0,
) -> KimiK2:
    """A model whose backbone is random and lies in the processor's memory; equal seeds give equal weights.

    Matrices have a standard deviation of 1/sqrt(columns), so that hidden states keep their size; norms are 1
    and the routers' biases 0.
    """
    with init_empty_weights():
        model = KimiK2(config, dtype, processor)
    generator = torch.Generator(processor.device).manual_seed(seed)
    block = torch.empty(BLOCK, dtype=dtype, device=processor.device).normal_(generator=generator)
    for name, parameter in list(model.named_parameters()):
        module_name, _, attribute = name.rpartition(".")
        wanted = torch.float32 if keeps_fp32(module_name) else dtype
        if parameter.dim() == 1:
            one_or_zero = float(name.endswith("norm.weight"))
            weight = torch.full(parameter.shape, one_or_zero, dtype=wanted, device=processor.device)
        else:
            weight = _random_matrix(parameter.shape, wanted, block)
        module = model.get_submodule(module_name)
        setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
    return model.eval()


def _random_matrix(shape: torch.Size, dtype: torch.dtype, block: Tensor) -> Tensor:
    weight = torch.empty(shape, dtype=dtype, device=block.device)
    flat = weight.view(-1)
    for first in range(0, flat.numel(), len(block)):
        part = flat[first : first + len(block)]
        part.copy_(block[: len(part)])
    return weight.mul_(1 / math.sqrt(shape[-1]))


def experts_in_ram(ram: RamSlab, pool: cpu.ThreadPool) -> CpuExperts:
    """Experts that the CPU computes, all of them in the rows of `ram`."""
    return CpuExperts(ram.config, RamCache(ram), pool)
