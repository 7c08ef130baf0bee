"""Packing from what a checkpoint maps: AWQ's words as they lie in the file, and values rounded on the way."""

import numpy as np
import pytest

from tinychat import _cpu
from tinychat.backends.cpu_linear import aligned
from tinychat.checkpoint import awq, bitstream, gguf_file
from tinychat.qtensor import AwqWords, QTensor, bfloat16, round_symmetric

ISAS = _cpu.supported_isas().split()
TYPES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", bfloat16: "bf16"}


def packed(isa, shape, arrays, source, tiles=None, **how):
    """The packed bytes; every one was written, or it stays 0xAA."""
    n_tiles = -(-shape.n // _cpu.tile(isa))
    data = aligned(_cpu.packed_bytes(isa, shape))
    data[:] = 0xAA
    addresses = [a.ctypes.data for a in arrays] + [0] * (3 - len(arrays))
    for begin, end in tiles or [(0, n_tiles)]:
        _cpu.pack(isa, shape, *addresses, data.ctypes.data, begin, min(end, n_tiles), source, **how)
    return data


def quantized(n, k, group, wide=False, bits=4):
    return _cpu.LinearShape(_cpu.WeightType.quantized, n, k, group, wide, bits)


def words(n, k, group, scale_dtype=np.float16):
    rng = np.random.default_rng(n * 31 + k)
    scales = rng.uniform(0.01, 2, (k // group, n)).astype(scale_dtype)
    integers = (rng.integers(-(2**31), 2**31, (rows, n // 8), np.int32) for rows in (k, k // group))
    return AwqWords(*integers, scales)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "n, k, group",
    [
        *((8, 8, 8), (16, 64, 32), (24, 96, 16), (128, 128, 128), (136, 256, 64), (120, 40, 20), (264, 60, 12)),
        *((40, 7, 7), (8, 5, 1), (384, 384, 384), (1000, 640, 128), (128, 1100, 1100)),
    ],
)
def test_awq_words_pack_as_their_codes_do(isa, n, k, group):
    for dtype in (np.float16, np.float32):
        weight = words(n, k, group, dtype)
        q, shape = weight.tensor(), quantized(n, k, group, dtype == np.float32)
        expected = packed(isa, shape, (q.codes, q.scales, q.zeros), _cpu.Source.codes)
        arrays = (weight.qweight, weight.scales, weight.qzeros)
        assert np.array_equal(packed(isa, shape, arrays, _cpu.Source.awq), expected)
        parts = [(0, 1), (1, 5), (5, 8), (8, 19), (19, 1000)]
        parts = [(b, e) for b, e in parts if b < -(-n // _cpu.tile(isa))]
        assert np.array_equal(packed(isa, shape, arrays, _cpu.Source.awq, parts), expected)


def test_the_words_follow_the_formula():
    weight = words(24, 32, 16)
    q = weight.tensor()
    assert weight.shape == q.shape == (24, 32) and weight.group_size == q.group_size == 16 and weight.bits == q.bits
    assert weight.bits_per_weight == q.bits_per_weight
    again = awq.pack(q)
    assert np.array_equal(again["qweight"], weight.qweight) and np.array_equal(again["qzeros"], weight.qzeros)


def test_words_need_their_own_types():
    weight = words(8, 16, 8)
    with pytest.raises(TypeError, match="AwqWords of int64"):
        AwqWords(weight.qweight.astype(np.int64), weight.qzeros, weight.scales)


SIZES = [(16, 64, 32), (33, 96, 32), (7, 160, 160), (48, 130, 64), (100, 256, 20), (16, 8, 8), (5, 3, 3)]


@pytest.mark.parametrize("by_columns", [True, False], ids=["words of a column", "words of a row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n, k, group", SIZES)
def test_a_stream_packs_as_its_codes_do(n, k, group, bits, by_columns):
    rng = np.random.default_rng(n + k)
    n_words = -(-k * bits // 32)
    words = rng.integers(-(2**31), 2**31, (n, n_words), np.int32)
    words = np.asfortranarray(words) if by_columns else words
    grid = n, -(-k // group)
    scales, zeros = rng.uniform(0.01, 2, grid).astype(np.float16), rng.integers(0, 2**bits, grid, np.uint8)
    shape = quantized(n, k, group, bits=bits)
    for order in (None, rng.permutation(k).astype(np.int32)):
        weight = bitstream.stream(words, k, scales, zeros, bits, group, order)
        q = weight.tensor()
        how = {"row_stride": words.strides[0] // 4, "word_stride": words.strides[1] // 4}
        how["permutation"] = 0 if order is None else order.ctypes.data
        assert weight.shape == q.shape and weight.bits_per_weight == q.bits_per_weight
        for isa in ISAS:
            expected = packed(isa, shape, (q.codes, q.scales, q.zeros), _cpu.Source.codes)
            found = packed(isa, shape, (words, scales, zeros), _cpu.Source.stream, [(0, 1), (1, 1000)], **how)
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", [2, 8, 14], ids=["Q4_0", "Q8_0", "Q6_K"])
@pytest.mark.parametrize("n", [16, 37])
def test_blocks_pack_as_their_codes_do(kind, n):
    kind = gguf_file._KINDS[kind]
    stored = np.random.default_rng(n).integers(0, 256, (n, 3 * kind.nbytes), np.uint8)
    with np.errstate(invalid="ignore"):  # scales of any bits
        weight = kind.read(stored)
    q, k = weight.tensor(), 3 * kind.block
    wide = q.scales.dtype == np.float32
    shape = quantized(n, k, kind.group_size, wide, 4 if kind.bits == 4 else 8)
    assert q.shape == (n, k) and q.codes.max() < 2**kind.bits
    for isa in ISAS:
        expected = packed(isa, shape, (q.codes, q.scales, q.zeros), _cpu.Source.codes)
        source = getattr(_cpu.Source, weight.source)
        assert np.array_equal(packed(isa, shape, (stored, q.scales, q.zeros), source, [(0, 1), (1, 1000)]), expected)


def table(n, k, dtype, seed=0):
    """Rows of every size that the type has: near its largest, usual, subnormal, zero, ties between two integers."""
    rng = np.random.default_rng(seed)
    largest = {"float16": 6e4, "bfloat16": 1e30, "float32": 1e30}[np.dtype(dtype).name]
    values = rng.standard_normal((n, k)) * rng.choice([1e-7, 1e-4, 0.02, 1, 300, largest / 6], (n, 1))
    values[: n // 8] = rng.integers(-254, 255, (n // 8, k)) / 2 * 2.0**-7  # multiples of half a step
    values[n // 8, : k // 2] = 0
    values[n // 8 + 1] = 0
    with np.errstate(over="ignore"):
        return np.clip(values, -largest, largest).astype(dtype)


def unpacked(isa, shape, data):
    groups = (shape.n, -(-shape.k // shape.group))
    codes, zeros = np.empty((shape.n, shape.k), np.uint8), np.empty(groups, np.uint8)
    scales = np.empty(groups, np.float32 if shape.wide_scales else np.float16)
    _cpu.unpack(isa, shape, data.ctypes.data, codes.ctypes.data, scales.ctypes.data, zeros.ctypes.data)
    return QTensor(codes, scales, zeros, shape.bits, shape.group)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("n, k, group", [(64, 256, 128), (33, 300, 128), (17, 60, 60), (40, 1000, 1000), (16, 20, 7)])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_equals_its_specification(dtype, n, k, group, bits):
    values = table(n, k, dtype)
    expected = round_symmetric(values, bits, group)
    for isa in (ISAS[0], "scalar"):
        shape = quantized(n, k, group, bits=bits)
        data = packed(isa, shape, (values,), getattr(_cpu.Source, TYPES[values.dtype]))
        found = unpacked(isa, shape, data)
        for field in ("scales", "zeros", "codes"):
            assert np.array_equal(getattr(found, field), getattr(expected, field)), field
        arrays = (expected.codes, expected.scales, expected.zeros)
        assert np.array_equal(data, packed(isa, shape, arrays, _cpu.Source.codes))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_rounding_is_as_near_as_its_steps(dtype):
    values = np.asarray(table(64, 300, dtype)[:, :], np.float64)
    sane = np.abs(values).max(axis=1) < 127 * 65504  # beyond, fp16 has no scale
    q = round_symmetric(values.astype(dtype))
    each = np.minimum(128, 300 - np.arange(3) * 128)
    step = np.repeat(q.scales.astype(np.float64), each, axis=1)
    error = np.abs(q.dequantize(np.float64) - values)[sane]
    assert (error <= step[sane] * (0.5 + 1e-4)).all()
    assert q.codes.min() >= 1 and q.codes.max() == 255 and np.isfinite(q.scales).all()
    assert sane.all() or dtype != np.float16


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("n, k", [(16, 8), (33, 75), (1, 1), (48, 128), (20, 9)])
def test_plain_weights_lie_k_major_in_tiles(dtype, n, k):
    values = table(n, k, dtype) if n > 8 else np.ones((n, k), dtype)
    for isa in ISAS:
        shape = _cpu.LinearShape(getattr(_cpu.WeightType, TYPES[values.dtype]), n, k)
        data = packed(isa, shape, (values,), _cpu.Source.codes, [(0, 1), (1, 9)][: -(-n // 16)])
        tile = np.zeros((-(-n // 16) * 16, k), dtype)
        tile[:n] = values
        for i, part in enumerate(np.split(data.view(dtype), -(-n // 16))):
            expected = np.zeros(len(part), dtype)
            expected[: 16 * k] = tile[16 * i : 16 * i + 16].T.reshape(-1)
            assert np.array_equal(part.view(np.uint8), expected.view(np.uint8))
