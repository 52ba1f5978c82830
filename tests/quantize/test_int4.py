"""The INT4 quantizer: its error, equal bits on every path, and the format of compressed-tensors."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.int4 import expand_blocks, fp8_blocks, group_errors, least_errors, random_weights
from moebox import _kernels
from moebox.quantize.encodings import INT4_QUANTIZATION
from moebox.quantize.int4 import (
    NonFiniteError,
    QuantError,
    check_finite,
    dequantize,
    pack,
    quantize_int4,
    to_bfloat16,
    unpack,
)

PATHS = _kernels.isa_paths()
DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


def stored(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    return fp8_blocks(weights) if dtype == torch.float8_e4m3fn else (weights.to(dtype), None)


def decoded(weight: torch.Tensor, scale_inv: torch.Tensor | None) -> torch.Tensor:
    return weight.float() if scale_inv is None else weight.float() * expand_blocks(scale_inv, weight.shape)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 70),
    groups=st.integers(1, 40),
    exponent=st.integers(-12, 6),
    tails=st.sampled_from([None, 3]),
    seed=st.integers(0, 1 << 30),
)
def test_every_path_and_thread_count_gives_the_same_bits(dtype, rows, groups, exponent, tails, seed):
    weights = random_weights(rows, 32 * groups, seed, tails=tails) * 2.0**exponent
    weights[torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = 0
    weights[0, :32] = 0
    weight, scale_inv = stored(weights, dtype)
    reference = quantize_int4(weight, scale_inv, isa="scalar")
    converted = to_bfloat16(weight, scale_inv, isa="scalar")
    for isa in PATHS:
        for threads in (1, 3):
            result = quantize_int4(weight, scale_inv, threads=threads, isa=isa)
            assert torch.equal(result.packed, reference.packed), isa
            assert torch.equal(result.scale.view(torch.int16), reference.scale.view(torch.int16)), isa
            assert result.error == reference.error, isa
            assert torch.equal(to_bfloat16(weight, scale_inv, threads=threads, isa=isa), converted), isa


@pytest.mark.parametrize("tails", [None, 4])
def test_error_is_within_a_thousandth_of_the_least_possible(tails):
    weights = random_weights(12, 1024, tails=tails)
    least = least_errors(weights)
    result = quantize_int4(weights)
    errors = group_errors(weights, result.scale)
    assert (errors >= least * (1 - 1e-9)).all()
    assert math.sqrt(errors.sum() / least.sum()) < 1.001
    # For its scale every value is the nearest one, so that other values could not lower the error.
    assert result.error.sum_sq_error == pytest.approx(errors.sum().item(), rel=1e-4)
    rtn = group_errors(weights, (weights.view(12, -1, 32).abs().amax(-1) / 7.5).bfloat16())
    assert math.sqrt(errors.sum() / rtn.sum()) < 0.88


def test_error_sums_are_those_of_the_stored_weights():
    weight, scale_inv = fp8_blocks(random_weights(200, 416, tails=3))
    result = quantize_int4(weight, scale_inv, threads=2)
    source = decoded(weight, scale_inv).double()
    difference = dequantize(result.packed, result.scale, torch.float64) - source
    assert result.error.sum_sq_error == pytest.approx((difference**2).sum().item(), rel=1e-5)
    assert result.error.sum_sq == pytest.approx((source**2).sum().item(), rel=1e-5)
    assert result.error.max_abs == pytest.approx(difference.abs().max().item(), rel=1e-6)
    assert 0.05 < result.error.rel_rms < 0.15
    both = result.error + QuantError(1.0, 2.0, 3.0)
    assert both == QuantError(result.error.sum_sq_error + 1, result.error.sum_sq + 2, 3.0)


@settings(max_examples=25, deadline=None)
@given(exponent=st.integers(-50, 60), seed=st.integers(0, 1 << 30))
def test_a_power_of_two_moves_the_scales_only(exponent, seed):
    weights = random_weights(3, 96, seed)
    plain, moved = quantize_int4(weights), quantize_int4(weights * 2.0**exponent)
    assert torch.equal(moved.packed, plain.packed)
    assert torch.equal(moved.scale.float(), plain.scale.float() * 2.0**exponent)


def test_weights_on_an_int4_grid_come_back_exactly():
    values = torch.randint(-8, 8, (16, 128), generator=torch.Generator().manual_seed(1))
    values[:, ::32] = -8
    scale = random_weights(16, 4).abs().bfloat16()
    weights = dequantize(pack(values), scale, torch.float32)
    result = quantize_int4(weights)
    assert result.error.sum_sq_error == 0
    assert torch.equal(dequantize(result.packed, result.scale, torch.float32), weights)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_extreme_value_takes_minus_eight_whatever_its_sign(sign):
    weights = torch.linspace(-6, 6, 32)[None] * 0.01
    weights[0, 7] = sign * 0.08
    result = quantize_int4(weights)
    assert unpack(result.packed)[0, 7] == -8
    assert math.copysign(1, result.scale.item()) == -sign


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-42])
def test_zeros_and_specks_become_zeros_with_a_usable_scale(value):
    weights = torch.full((2, 64), 0.5)
    weights[0, :32] = value
    result = quantize_int4(weights)
    assert result.scale[0, 0] == 2.0**-14
    assert not unpack(result.packed)[0, :32].any()
    dense = dequantize(result.packed, result.scale)
    assert torch.equal(dense[0, :32].abs(), torch.zeros(32, dtype=torch.bfloat16))
    torch.testing.assert_close(dense[1].float(), weights[1], rtol=0.01, atol=0)


def test_a_lone_value_in_a_group_is_kept():
    weights = torch.zeros(1, 32)
    weights[0, 31] = 0.123
    result = quantize_int4(weights)
    dense = dequantize(result.packed, result.scale, torch.float32)
    assert dense[0, :31].count_nonzero() == 0
    assert dense[0, 31].item() == pytest.approx(0.123, rel=2**-8)


def test_packing_is_that_of_compressed_tensors():
    values = torch.randint(-8, 8, (24, 160), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    packed = pack(values)
    assert torch.equal(packed, pack_to_int32(values, 4))
    assert torch.equal(unpack(packed), unpack_from_int32(packed, 4, values.shape))
    assert torch.equal(unpack(packed), values)


def test_compressed_tensors_reads_what_the_quantizer_writes():
    weights = random_weights(64, 224)
    result = quantize_int4(weights)
    scheme = QuantizationScheme(**INT4_QUANTIZATION["config_groups"]["group_0"])
    state = {
        "weight_packed": result.packed,
        "weight_scale": result.scale,
        "weight_shape": torch.tensor([64, 224], dtype=torch.int32),
    }
    dense = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert dense.dtype == torch.bfloat16
    assert torch.equal(dense, dequantize(result.packed, result.scale))


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("shape", [(576, 416), (80, 160), (1, 32), (129, 257), (3, 5)])
def test_fp8_with_partial_blocks_is_the_product_that_torch_gives(isa, shape):
    weight, scale_inv = fp8_blocks(random_weights(*shape))
    converted = to_bfloat16(weight, scale_inv, isa=isa)
    assert torch.equal(converted, decoded(weight, scale_inv).bfloat16())


@pytest.mark.parametrize("isa", PATHS)
def test_every_finite_narrow_float_is_decoded_exactly(isa):
    codes = torch.arange(256, dtype=torch.uint8)[(torch.arange(256) & 127) != 127]
    fp8 = codes.view(torch.float8_e4m3fn)[None]
    factors = torch.tensor([[0.0123], [3.0]]).view(1, 2)
    assert torch.equal(to_bfloat16(fp8, factors, isa=isa), decoded(fp8, factors).bfloat16())
    halves = torch.arange(-32768, 32768).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    assert torch.equal(to_bfloat16(halves, isa=isa), halves.bfloat16())
    brains = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16)
    brains = brains[brains.isfinite()]
    assert to_bfloat16(brains, isa=isa) is brains
    singles = brains.float().view(torch.int32)[:, None] + torch.tensor([0, 0x7FFF, 0x8000, 0x8001])
    singles = singles.flatten().view(torch.float32)
    singles = singles[singles.bfloat16().isfinite()]
    assert torch.equal(to_bfloat16(singles, isa=isa), singles.bfloat16())


@pytest.mark.parametrize("isa", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_first_weight_that_is_not_finite_is_named(isa, dtype, threads):
    weight, scale_inv = stored(random_weights(40, 800), dtype)
    for row, column in ((37, 0), (33, 799), (33, 640)):
        weight[row, column] = math.nan
    for call in (quantize_int4, to_bfloat16):
        with pytest.raises(NonFiniteError, match=r"\[33, 640\] is nan"):
            call(weight, scale_inv, threads=threads, isa=isa)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 2.0**60, -3e38])
def test_weights_beyond_any_trained_model_are_named(value):
    weights = random_weights(4, 64)
    weights[2, 33] = value
    with pytest.raises(NonFiniteError, match=r"\[2, 33\] is"):
        quantize_int4(weights)


def test_a_block_factor_that_is_not_finite_is_named():
    weight, scale_inv = fp8_blocks(random_weights(200, 288))
    scale_inv[1, 2] = math.inf
    for call in (quantize_int4, to_bfloat16):
        with pytest.raises(NonFiniteError, match=r"\[128, 256\] is .* x inf"):
            call(weight, scale_inv)


def test_a_value_that_overflows_bfloat16_is_named():
    with pytest.raises(NonFiniteError, match=r"\[3\] is 3.4"):
        to_bfloat16(torch.tensor([0.0, 1.0, 2.0, 3.4e38]))


def test_check_finite_names_the_position():
    values = torch.ones(3, 4, dtype=torch.bfloat16)
    check_finite(values)
    values[2, 1] = -math.inf
    with pytest.raises(NonFiniteError, match=r"\[2, 1\] is -inf"):
        check_finite(values)


def test_shapes_that_do_not_fit_are_refused():
    weight, scale_inv = fp8_blocks(random_weights(130, 160))
    with pytest.raises(ValueError, match="33 columns"):
        quantize_int4(torch.zeros(2, 33))
    with pytest.raises(ValueError, match=r"must be float32 \[2, 2\]"):
        quantize_int4(weight, scale_inv[:1])
    with pytest.raises(ValueError, match="scale_inv goes with"):
        quantize_int4(weight)
    with pytest.raises(ValueError, match="scale_inv goes with"):
        to_bfloat16(torch.zeros(130, 160), scale_inv)
    with pytest.raises(ValueError, match="must be a float matrix"):
        quantize_int4(torch.zeros(32))
    with pytest.raises(ValueError, match="cannot run here"):
        quantize_int4(torch.zeros(1, 32), isa="mmx")


def test_the_kernel_checks_its_arrays_itself():
    weight = torch.zeros(2, 256, dtype=torch.uint8).numpy()
    packed, scale = torch.zeros(2, 7, dtype=torch.int32).numpy(), torch.zeros(2, 2).to(torch.uint16).numpy()
    with pytest.raises(ValueError, match=r"packed: shape \[2, 7\] given, \[rows=2, columns/8=8\] needed"):
        _kernels.quantize_int4(weight, "F32", None, packed, scale, 1, None)
    with pytest.raises(ValueError, match="dtype"):
        _kernels.quantize_int4(weight, "F64", None, packed, scale, 1, None)
    with pytest.raises(ValueError, match="scale_inv"):
        _kernels.quantize_int4(weight, "F8_E4M3", None, packed, scale, 1, None)
