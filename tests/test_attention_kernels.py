"""Store and attention of every instruction-set level against float64."""

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
def test_store_rounds_as_ieee(isa):
    edge = np.array(
        [0, -0.0, 1, 65504, 65519.9, 65520, 1e9, -1e9, 6e-8, 2.9e-8, 3e-8, -6.1e-5, 6.1035e-5, np.inf, 1e-30]
    )
    x = np.concatenate([edge, f32(82, seed=3, scale=1e-5), f32(70, seed=4, scale=100)]).astype(np.float32)
    entry, untouched = guarded(len(x), np.float16)
    _cpu.store(isa, _cpu.CacheType.f16, x.ctypes.data, len(x), entry.ctypes.data)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(entry, x.astype(np.float16))
    assert untouched()


def attended(q, keys, values, scale):
    """[heads, dim] in float64."""
    scores = q.astype(np.float64) @ keys.astype(np.float64).T * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values.astype(np.float64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("dim", [8, 10, 64, 80, 100, 128])
def test_attention(isa, dtype, dim):
    numpy_dtype = {"f16": np.float16, "f32": np.float32}[dtype]
    keys, values = (f32(300, dim, seed=s).astype(numpy_dtype) for s in (1, 2))
    for heads, begin, end, spread in [
        (1, 0, 1, 1),
        (3, 0, 17, 1),
        (7, 5, 300, 1),
        (4, 250, 299, 30),
        (2, 0, 300, 1000),
    ]:
        q = f32(heads, dim + 3, seed=heads, scale=spread)
        out, untouched = guarded(heads * (dim + 5))
        out = out.reshape(heads, dim + 5)
        scores = np.empty(heads * (end - begin), np.float32)
        scale = dim**-0.5
        _cpu.attend(
            isa,
            getattr(_cpu.CacheType, dtype),
            q.ctypes.data,
            dim + 3,
            keys.ctypes.data,
            values.ctypes.data,
            begin,
            end,
            heads,
            dim,
            scale,
            scores.ctypes.data,
            out.ctypes.data,
            dim + 5,
        )
        expected = attended(q[:, :dim], keys[begin:end], values[begin:end], scale)
        np.testing.assert_allclose(out[:, :dim], expected, atol=1e-6 + 3e-6 * spread)
        assert untouched() and (out[:, dim:] == 77).all()
