"""Rotation, storing and attention of every instruction-set level against float64."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest

from tinychat.backends import cpu

if cpu.available():
    pytest.skip(f"cpu backend: {cpu.available()}", allow_module_level=True)


from tinychat import _cpu
from tinychat.cache import dequantize_entries, quantize_entries

ISAS = _cpu.supported_isas().split()
TYPES = {"f32": np.float32, "f16": np.float16, "q8": np.int8}


def f32(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@dataclass
class Cache:
    """Entries of one head as the kernels see them, and the numbers they stand for in float64."""

    dtype: str
    keys: np.ndarray
    values: np.ndarray
    key_scales: np.ndarray
    value_scales: np.ndarray

    @staticmethod
    def of(dtype, keys, values):
        none = np.zeros(len(keys), np.float32)
        if dtype != "q8":
            return Cache(dtype, keys.astype(TYPES[dtype]), values.astype(TYPES[dtype]), none, none)
        (keys, key_scales), (values, value_scales) = quantize_entries(keys), quantize_entries(values)
        return Cache(dtype, keys, values, key_scales, value_scales)

    def view(self):
        addresses = (a.ctypes.data for a in (self.keys, self.values, self.key_scales, self.value_scales))
        return _cpu.CacheView(getattr(_cpu.CacheType, self.dtype), *addresses)

    def exact(self):
        if self.dtype != "q8":
            return self.keys.astype(np.float64), self.values.astype(np.float64)
        return tuple(
            dequantize_entries(codes, scales).astype(np.float64)
            for codes, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )


def partial(isa, cache, q, position, *, window=0, slopes=None, begin=0, end=None, scale=None, fetch=_cpu.Fetch.far):
    """The kernel's (out [rows, heads, dim], maximum, sum [rows, heads]); q [rows, heads, dim]."""
    rows, heads, dim = q.shape
    wide = np.full((rows, heads * dim + 3), np.nan, np.float32)
    wide[:, : heads * dim] = q.reshape(rows, -1)
    out = np.full((rows, heads * dim + 5), 77, np.float32)
    maximum, total = np.full((2, rows * heads + 1), 77, np.float32)
    _cpu.attend(
        isa,
        cache.view(),
        dim=dim,
        heads=heads,
        scale=scale or dim**-0.5,
        slopes=0 if slopes is None else slopes.ctypes.data,
        q=wide.ctypes.data,
        q_stride=wide.shape[1],
        rows=rows,
        position=position,
        window=window,
        begin=begin,
        end=position + rows if end is None else end,
        out=out.ctypes.data,
        out_stride=out.shape[1],
        maximum=maximum.ctypes.data,
        sum=total.ctypes.data,
        fetch=fetch,
    )
    assert (out[:, heads * dim :] == 77).all() and maximum[-1] == total[-1] == 77
    return out[:, : heads * dim].reshape(q.shape), maximum[:-1].reshape(rows, heads), total[:-1].reshape(rows, heads)


def attended(*args, **options):
    out, _, total = partial(*args, **options)
    return out / total[..., None]


def expected(cache, q, position, *, window=0, slopes=None):
    """[rows, heads, dim] in float64."""
    keys, values = cache.exact()
    mixed = np.empty(q.shape)
    for row in range(len(q)):
        seen = np.arange(max(0, position + row + 1 - window) if window else 0, position + row + 1)
        scores = q[row].astype(np.float64) @ keys[seen].T * q.shape[2] ** -0.5
        if slopes is not None:
            scores += slopes[:, None].astype(np.float64) * (seen - position - row)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[row] = weights / weights.sum(-1, keepdims=True) @ values[seen]
    return mixed


@pytest.mark.parametrize("isa", ISAS)
def test_heads_are_rotated(isa):
    for half in (0, 1, 7, 8, 16, 33, 64):
        angle, head = f32(half, seed=half), f32(2 * half + 3, seed=half + 1)
        cos, sin, turned = np.cos(angle), np.sin(angle), head.copy()
        _cpu.rotate(isa, turned.ctypes.data, cos.ctypes.data, sin.ctypes.data, half)
        a, b = head[:half], head[half : 2 * half]
        np.testing.assert_allclose(
            turned, np.concatenate([a * cos - b * sin, b * cos + a * sin, head[2 * half :]]), atol=1e-6
        )


def stored(isa, dtype, key, value):
    """A cache of five entries after key and value became entry 2; that the others stay is checked."""
    dim = len(key)
    keys, values = np.full((2, 5, dim), 77, TYPES[dtype])
    cache = Cache(dtype, keys, values, *np.full((2, 5), 77, np.float32))
    _cpu.store(isa, cache.view(), key.ctypes.data, value.ctypes.data, dim, 2)
    others = [0, 1, 3, 4]
    assert all((a[others] == 77).all() for a in (keys, values, cache.key_scales, cache.value_scales))
    return cache


@pytest.mark.parametrize("isa", ISAS)
def test_store_rounds_as_ieee(isa):
    edge = [0, -0.0, 1, 65504, 65519.9, 65520, 1e9, -1e9, 6e-8, 2.9e-8, 3e-8, -6.1e-5, 6.1035e-5, np.inf, 1e-30]
    x = np.concatenate([edge, f32(82, seed=3, scale=1e-5), f32(70, seed=4, scale=100)]).astype(np.float32)
    for n in (len(x), 1, 8, 15):
        key = np.ascontiguousarray(x[-n:])
        for dtype in ("f16", "f32"):
            cache = stored(isa, dtype, key, x[:n])
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(cache.keys[2], key.astype(TYPES[dtype]))
                np.testing.assert_array_equal(cache.values[2], x[:n].astype(TYPES[dtype]))


@pytest.mark.parametrize("isa", ISAS)
def test_store_quantizes_to_nearest(isa):
    for n in (1, 7, 16, 64, 80, 100, 256):
        ties = (np.arange(n) - n // 2).astype(np.float32) + 0.5
        ties[0] = 127  # scale 1: the rest lie between two codes
        smallest = np.float32(2.0**-149)
        for key in (f32(n, seed=n), ties, np.zeros(n, np.float32), f32(n, scale=1e30), ties * smallest * 3):
            value = f32(n, seed=n + 1, scale=100)
            cache = stored(isa, "q8", key, value)
            for x, codes, scales in ((key, cache.keys, cache.key_scales), (value, cache.values, cache.value_scales)):
                want, scale = quantize_entries(x)
                assert scales[2] == scale
                np.testing.assert_array_equal(codes[2], want)
    for broken in (np.nan, np.inf):
        x = f32(33)
        x[20] = broken
        assert np.isnan(stored(isa, "q8", x, x).key_scales[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 64, 80, 96, 100, 128, 256])
def test_attention(isa, dtype, dim):
    cache = Cache.of(dtype, f32(300, dim, seed=1), f32(300, dim, seed=2))
    for rows, heads, position, window, spread in [
        (1, 1, 0, 0, 1),
        (1, 3, 16, 0, 1),
        (1, 7, 299, 0, 1),
        (1, 4, 298, 49, 30),
        (1, 2, 299, 0, 1000),
        (3, 1, 130, 0, 1),
        (2, 5, 298, 2, 1),
        (3, 4, 0, 0, 1),  # as many queries as there are 12: the most that stream
        (20, 1, 0, 0, 1),
        (65, 1, 100, 0, 1),
        (40, 3, 63, 17, 30),
        (1, 71, 299, 0, 1),
        (9, 2, 290, 130, 1000),
    ]:
        q = f32(rows, heads, dim, seed=heads + rows, scale=spread)
        for slopes in (None, f32(heads, seed=3, scale=0.1)):
            options = {"window": window, "slopes": slopes}
            np.testing.assert_allclose(
                attended(isa, cache, q, position, **options),
                expected(cache, q, position, **options),
                atol=2e-6 + 1e-5 * spread,
            )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_pieces_merge_to_the_whole(isa, dtype):
    dim, n = 80, 700
    cache = Cache.of(dtype, f32(n, dim, seed=1), f32(n, dim, seed=2))
    for rows, heads, window in [(1, 4, 0), (1, 1, 500), (3, 2, 0), (30, 1, 0), (30, 3, 100)]:
        q = f32(rows, heads, dim, seed=rows, scale=3)
        first = max(0, n - rows + 1 - window) if window else 0
        cuts = [first, first + 1, first + 64, n - 7, n]
        parts = [partial(isa, cache, q, n - rows, window=window, begin=a, end=b) for a, b in pairwise(cuts)]
        largest = np.max([maximum for _, maximum, _ in parts], axis=0)
        with np.errstate(invalid="raise"):
            factors = [np.exp(maximum - largest) for _, maximum, _ in parts]
        out = sum(f[..., None] * out for f, (out, _, _) in zip(factors, parts, strict=True))
        total = sum(f * total for f, (_, _, total) in zip(factors, parts, strict=True))
        whole = attended(isa, cache, q, n - rows, window=window, begin=first)
        np.testing.assert_allclose(out / total[..., None], whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", [0, 40])
def test_rows_together_attend_as_one_by_one(isa, dtype, window):
    dim, heads, position, rows = 64, 2, 37, 100
    cache = Cache.of(dtype, f32(200, dim, seed=1), f32(200, dim, seed=2))
    q, slopes = f32(rows, heads, dim, seed=3), np.array([0.5, 0.01], np.float32)
    together = attended(isa, cache, q, position, window=window, slopes=slopes)
    for row in range(rows):
        one = attended(isa, cache, q[row : row + 1], position + row, window=window, slopes=slopes)
        np.testing.assert_allclose(together[row : row + 1], one, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_asking_for_entries_ahead_changes_no_bit(isa, dtype):
    cache = Cache.of(dtype, f32(200, 100, seed=1), f32(200, 100, seed=2))
    q = f32(1, 3, 100, seed=3)
    far = attended(isa, cache, q, 150)
    for fetch in (_cpu.Fetch.near, _cpu.Fetch.none):
        assert attended(isa, cache, q, 150, fetch=fetch).tobytes() == far.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 30])
def test_what_is_not_seen_does_not_count(isa, rows):
    """Entries beyond the last row's may hold anything, NaN included, and a row may see nothing of a piece."""
    dim = 48
    keys, values = f32(100, dim, seed=1), f32(100, dim, seed=2)
    q = f32(rows, 2, dim)
    clean = attended(isa, Cache.of("f16", keys, values), q, 50)
    keys[50 + rows :], values[50 + rows :] = np.nan, np.nan
    np.testing.assert_array_equal(attended(isa, Cache.of("f16", keys, values), q, 50), clean)
    out, maximum, total = partial(isa, Cache.of("f16", keys, values), q, 50, window=5, begin=0, end=20)
    assert (out == 0).all() and (maximum == -np.inf).all() and (total == 0).all()
    keys[50] = np.nan
    assert np.isnan(attended(isa, Cache.of("f16", keys, values), q, 50)).all()
