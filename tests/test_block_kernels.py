"""Norm and activation of every instruction-set level against float64."""

import math

import numpy as np
import pytest

from tinychat.backends import cpu

if cpu.available():
    pytest.skip(f"cpu backend: {cpu.available()}", allow_module_level=True)

from tinychat import _cpu

ISAS = _cpu.supported_isas().split()


def f32(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def guarded(n, dtype=np.float32):
    """n values to write to, and a check that nothing after them is touched."""
    memory = np.full(n + 64, 77, dtype)

    def untouched():
        return (memory[n:] == 77).all()

    return memory[:n], untouched


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 33, 64, 100, 384, 1001])
def test_norm_and_silu(isa, n):
    x, weight = f32(n, seed=n), f32(n, seed=n + 1)
    y, untouched = guarded(n)
    _cpu.rms_norm(isa, x.ctypes.data, weight.ctypes.data, 1e-5, n, y.ctypes.data)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean() + 1e-5) * weight, rtol=2e-6)
    assert untouched()

    gate = f32(n, seed=n, scale=20)
    gate[: min(n, 4)] = [-1e4, 1e4, 0, -88.5][: min(n, 4)]
    _cpu.activate(isa, _cpu.Activation.silu, gate.ctypes.data, weight.ctypes.data, n, y.ctypes.data)
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(y, wide / (1 + np.exp(-wide)) * weight, rtol=2e-6, atol=1e-35)
    assert untouched()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 63, 64, 65, 1001])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_in_pieces(isa, n, kind):
    x, y, weight, bias = (f32(n, seed=n + s) + 3 * (s == 0) for s in range(4))
    total, untouched = guarded(n)
    total[:] = x
    _cpu.add(isa, total.ctypes.data, y.ctypes.data, 1, n)
    np.testing.assert_array_equal(total, x + y)
    mean, variance = _cpu.moments(isa, getattr(_cpu.NormType, kind), total.ctypes.data, n)
    wide = total.astype(np.float64)
    expected = wide.mean() if kind == "layer" else 0
    np.testing.assert_allclose([mean, variance], [expected, ((wide - expected) ** 2).mean()], rtol=2e-6, atol=1e-12)
    for shift in (bias, None):
        out, out_untouched = guarded(n)
        address = 0 if shift is None else shift.ctypes.data
        _cpu.normalize(isa, total.ctypes.data, mean, 1.7, weight.ctypes.data, address, n, out.ctypes.data)
        expected = (wide - mean) * 1.7 * weight + (0 if shift is None else shift)
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=2e-6)
        assert out_untouched()
    assert untouched()


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_is_the_one_with_erf(isa):
    x = np.concatenate([np.linspace(-12, 12, 4801), [0, -0.0, 1e30, -1e30, 100, -100]]).astype(np.float32)
    up, y = f32(len(x), seed=1), np.empty_like(x)
    expected = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.astype(np.float64)])
    for factor in (None, up):
        address = 0 if factor is None else factor.ctypes.data
        _cpu.activate(isa, _cpu.Activation.gelu, x.ctypes.data, address, len(x), y.ctypes.data)
        np.testing.assert_allclose(y, expected * (1 if factor is None else factor), rtol=5e-7, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_by_tanh_and_relu(isa):
    x = np.concatenate([np.linspace(-12, 12, 4801), [0, -0.0, 1e30, -1e30, 100, -100, np.nan]]).astype(np.float32)
    up, wide = f32(len(x), seed=1), x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
        expected = {"gelu_tanh": wide / (1 + np.exp(-2 * u)), "relu": np.where(wide < 0, 0, wide)}
    for kind, want in expected.items():
        for factor in (None, up):
            y, untouched = guarded(len(x))
            address = 0 if factor is None else factor.ctypes.data
            _cpu.activate(isa, getattr(_cpu.Activation, kind), x.ctypes.data, address, len(x), y.ctypes.data)
            np.testing.assert_allclose(y, want * (1 if factor is None else factor), rtol=5e-6, atol=1e-20)
            assert untouched()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 7, 16, 33, 1001])
def test_soft_cap_and_scaled_sums(isa, n):
    x, y = f32(n, seed=n, scale=40), f32(n, seed=n + 1)
    x[: min(n, 4)] = [0, 1e30, -1e30, np.nan][: min(n, 4)]
    capped, untouched = guarded(n)
    capped[:] = x
    _cpu.soft_cap(isa, capped.ctypes.data, 30, n)
    np.testing.assert_allclose(capped, 30 * np.tanh(x.astype(np.float64) / 30), rtol=1e-6, atol=1e-5)
    assert untouched()
    total, untouched = guarded(n)
    total[:] = x
    _cpu.add(isa, total.ctypes.data, y.ctypes.data, 0.22, n)
    np.testing.assert_allclose(total, x + 0.22 * y, rtol=1e-6, atol=1e-6)
    assert untouched()


@pytest.mark.parametrize("isa", ISAS)
def test_silu_has_the_exponential_to_1e_6_everywhere(isa):
    gate = np.linspace(-87, 87, 20001).astype(np.float32)
    up, y = np.ones_like(gate), np.empty_like(gate)
    _cpu.activate(isa, _cpu.Activation.silu, gate.ctypes.data, up.ctypes.data, len(gate), y.ctypes.data)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(y, wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-37)
    broken = np.array([np.nan, np.inf, -1e30, 1e30], np.float32)
    _cpu.activate(isa, _cpu.Activation.silu, broken.ctypes.data, up.ctypes.data, 4, y.ctypes.data)
    assert np.isnan(y[0]) and y[1] == np.inf and y[2] == 0 and y[3] == np.float32(1e30)
