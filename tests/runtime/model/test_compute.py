"""The fused attention of a GPU's prefill equals the CPU's attention."""

import pytest
import torch

from helpers.offload.gpu import DEVICES, need
from moebox.kernels.gpu.ops import load_ops
from moebox.runtime.model.compute import EXPANDED_BYTES, CpuProcessor, GpuProcessor


def processor(device):
    on = torch.device("cuda" if need(device) == "cuda" else "cpu")
    return GpuProcessor(on, load_ops(on))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "total"), [(1, 1), (7, 7), (5, 12), (64, 200), (1, 33)])
@pytest.mark.parametrize("widths", [(192, 128), (48, 32), (12, 12)])
def test_causal_attention_behind_a_prefix(device, count, total, widths):
    gpu = processor(device)
    generator = torch.Generator().manual_seed(count + total)
    query, keys = (torch.randn(3, n, widths[0], generator=generator).bfloat16() for n in (count, total))
    values = torch.randn(3, total, widths[1], generator=generator).bfloat16()
    expected = CpuProcessor().attend(query.float(), keys.float(), values.float(), 0.1)
    mixed = gpu.attend(query.to(gpu.device), keys.to(gpu.device), values.to(gpu.device), 0.1)
    assert mixed.shape == expected.shape
    assert (mixed.float().cpu() - expected).norm() <= 5e-3 * expected.norm()


def test_heads_at_once_limit_memory():
    gpu = processor("stand-in")
    for total in (100, 10_000, 1_000_000):
        heads = gpu.heads_at_once(1, total, 704)
        assert heads == 1 or heads * total * 704 * 2 <= EXPANDED_BYTES
