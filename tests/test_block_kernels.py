"""Norm and activation of every instruction-set level against float64."""

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
def test_silu_has_the_exponential_to_1e_6_everywhere(isa):
    gate = np.linspace(-87, 87, 20001).astype(np.float32)
    up, y = np.ones_like(gate), np.empty_like(gate)
    _cpu.activate(isa, _cpu.Activation.silu, gate.ctypes.data, up.ctypes.data, len(gate), y.ctypes.data)
    wide = gate.astype(np.float64)
    np.testing.assert_allclose(y, wide / (1 + np.exp(-wide)), rtol=1e-6, atol=1e-37)
    broken = np.array([np.nan, np.inf, -1e30, 1e30], np.float32)
    _cpu.activate(isa, _cpu.Activation.silu, broken.ctypes.data, up.ctypes.data, 4, y.ctypes.data)
    assert np.isnan(y[0]) and y[1] == np.inf and y[2] == 0 and y[3] == np.float32(1e30)
