"""Numbers that C++, Triton and Python must share have one definition each."""

from __future__ import annotations

from moebox import _kernels, config
from moebox.kernels import cpu
from moebox.quantize import encodings
from moebox.runtime.engine import cpu_plan, gpu_plan
from moebox.runtime.model.compute import CPU


def test_the_format_has_the_numbers_that_checkpoints_have():
    """Compared with literals: published checkpoints have these sizes."""
    assert _kernels.GROUP_SIZE == config.GROUP_SIZE == 32
    assert _kernels.FP8_BLOCK == encodings.FP8_BLOCK == 128
    group = encodings.INT4_QUANTIZATION["config_groups"]["group_0"]
    assert group["weights"]["group_size"] == _kernels.GROUP_SIZE


def test_plans_count_with_the_kernels_numbers():
    assert cpu_plan.BATCH_PAIRS == cpu.BATCH_PAIRS == _kernels.BATCH_PAIRS == 2048
    assert cpu_plan.PART_TOKENS == CPU.part_tokens == cpu.PART_TOKENS == 1024
    assert gpu_plan.ROUND_PAIRS == 8192
