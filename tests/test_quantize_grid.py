import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.errors import CheckpointError, UsageError
from tinychat.quantize.grid import Grid

BITS = st.integers(2, 8)
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))
GROUPS = st.one_of(st.just(-1), st.integers(1, 80))


def matrix(shape, seed, scale):
    generator = np.random.default_rng(seed)
    return torch.from_numpy((generator.standard_normal(shape) * scale).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(BITS, GROUPS, SHAPES, st.integers(0, 99), st.floats(-9, 3))
def test_every_weight_lies_within_half_a_step(bits, group, shape, seed, exponent):
    weight = matrix(shape, seed, 10.0**exponent)
    quantized = Grid(bits, group).quantize(weight)
    assert quantized.shape == shape and quantized.scales.dtype == np.float16
    assert quantized.codes.max() < 2**bits and quantized.zeros.max() < 2**bits
    groups = np.arange(shape[1]) // quantized.group_size
    step = quantized.scales.astype(np.float64)[:, groups]
    error = np.abs(quantized.dequantize(np.float64) - weight.numpy())
    # half a step, and what fp16 rounding of the scale (2**-11 of each of the steps) can cut off at the ends; zero and
    # the rounded zero point share the range, which costs another half step at one end.
    assert (error <= step * (0.5 + 2.0**-11 * 2**bits + 0.5) + 1e-12).all()
    inside = (quantized.codes > 0) & (quantized.codes < 2**bits - 1)
    assert (error[inside] <= step[inside] * 0.5001).all()


@settings(max_examples=30, deadline=None)
@given(BITS, GROUPS, SHAPES, st.integers(0, 99))
def test_round_trip_is_what_is_written(bits, group, shape, seed):
    weight = matrix(shape, seed, 0.1)
    grid = Grid(bits, group)
    assert np.array_equal(grid.round_trip(weight).numpy(), grid.quantize(weight).dequantize())


@settings(max_examples=30, deadline=None)
@given(BITS, st.integers(0, 99))
def test_numbers_on_the_grid_stay(bits, seed):
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**bits, (4, 32))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    zeros = generator.integers(0, 2**bits, (4, 1))
    scales = generator.uniform(0.001, 0.1, (4, 1)).astype(np.float16).astype(np.float32)
    weight = torch.from_numpy(((codes - zeros) * scales).astype(np.float32))
    quantized = Grid(bits, 32).quantize(weight)
    assert np.array_equal(quantized.codes, codes) and np.array_equal(quantized.zeros, zeros)
    assert np.array_equal(quantized.dequantize(), weight.numpy())


@pytest.mark.parametrize("value", [0.0, 1.5, -0.3, 6e-8, -6e-8, 60000.0])
@pytest.mark.parametrize("bits", [2, 4])
def test_constant_groups_are_exact(value, bits):
    weight = torch.full((3, 21), float(np.float16(value)))
    assert np.array_equal(Grid(bits, 8).quantize(weight).dequantize(), weight.numpy())


def test_zero_stays_zero():
    weight = matrix((8, 64), 0, 1.0) + 3
    weight[:, ::5] = 0
    assert (Grid(4, 64).round_trip(weight)[:, ::5] == 0).all()


def test_tiny_weights_are_not_cut_off():
    """Scales among fp16's subnormals are coarse, and are rounded up."""
    weight = matrix((16, 64), 1, 3e-6)
    quantized = Grid(4, 64).quantize(weight)
    step = quantized.scales.astype(np.float32)
    assert (step > 0).all() and (step < 2.0**-14).all()
    assert (np.abs(quantized.dequantize() - weight.numpy()) <= step * 0.51).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_by_name(value):
    weight = torch.zeros(4, 16)
    weight[2, 3] = value
    with pytest.raises(CheckpointError, match=r"model\.down_proj: 1 of 64 weights are not finite"):
        Grid(4, 8).quantize(weight, "model.down_proj")


def test_weights_beyond_fp16_scales_are_refused():
    with pytest.raises(CheckpointError, match=r"model\.up_proj: .*65504"):
        Grid(4, 8).quantize(torch.linspace(-1e6, 1e6, 8)[None], "model.up_proj")


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_bits_out_of_range(bits):
    with pytest.raises(UsageError, match="bits"):
        Grid(bits, 32)


@pytest.mark.parametrize("group_size", [0, -2])
def test_group_size_out_of_range(group_size):
    with pytest.raises(UsageError, match="group size"):
        Grid(4, group_size)
