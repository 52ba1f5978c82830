"""A kernel that computes something else is found before a model answers."""

from types import SimpleNamespace

import pytest
import torch

from helpers.offload.tiers import build
from moebox.errors import DeviceError
from moebox.kernels.gpu.reference import ops as torch_ops
from moebox.offload.device.stand_in import StandInDevice

KERNELS = ("experts_one", "experts_many", "split_expert")


def off_by(factor):
    """The kernel of this name, its output scaled by `factor`."""

    def broken(name):
        def kernel(slab, shape, *arguments, **rest):
            out = next(
                a for a in reversed(arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.float32
            )
            before = torch.zeros_like(out) if name == "experts_one" else out.clone()
            getattr(torch_ops, name)(slab, shape, *arguments, **rest)
            out.copy_(before + (out - before) * factor)

        return kernel

    return broken


def device_with(name, kernel):
    device = StandInDevice(max_delay_us=0)
    right = {other: getattr(torch_ops, other) for other in torch_ops.__all__}
    device.ops = SimpleNamespace(**(right | {name: kernel}))
    return device


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("factor", [1.05, 0.0, float("nan")])
def test_a_wrong_kernel_is_refused_by_name(name, factor):
    with pytest.raises(DeviceError, match=f"GPU kernel {name}: relative error"):
        build(device_with(name, off_by(factor)(name)), slots=12)


@pytest.mark.parametrize("name", KERNELS)
def test_rounding_is_accepted(name):
    tiers = build(device_with(name, off_by(1.004)(name)), slots=12)
    assert tiers.gpu.residency.n_resident == tiers.gpu.n_cached
