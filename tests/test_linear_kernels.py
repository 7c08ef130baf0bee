"""Every linear of every instruction-set level that this machine has, against float64."""

import ctypes
import itertools
import mmap
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tinychat.backends import cpu_linear
from tinychat.backends.cpu_linear import PackedLinear, linear
from tinychat.checkpoint import bitstream, gguf_file
from tinychat.errors import BackendError
from tinychat.qtensor import QTensor, bfloat16
from tinychat.weights import Linear

cpu = pytest.importorskip("tinychat._cpu", reason="the compiled extension is not built")

ISAS = cpu.supported_isas().split()
BITS = (2, 3, 4, 8)
FLOATS = (np.float32, np.float16, bfloat16)
# (N, K, group size): each a multiple of nothing in its own way; whole rows are one group of K
SHAPES = (
    (1, 1, 64),
    (15, 7, 32),
    (17, 100, 100),
    (33, 172, 32),
    (5, 172, 172),
    (16, 129, 128),
    (40, 192, 64),
    (31, 1100, 1100),
    (24, 700, 200),
    (19, 4548, 128),
    (18, 11008, 11008),
    (67, 172, 100),  # of tiles enough for a panel of rows
    (70, 1100, 1100),
)

pytestmark = pytest.mark.parametrize("isa", ISAS)


def qtensor(n, k, group, seed=0, scale_dtype=np.float16, bits=4):
    rng = np.random.default_rng(seed)
    groups = (n, -(-k // group))
    codes = rng.integers(0, 2**bits, (n, k), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, groups, dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, groups).astype(scale_dtype)
    return QTensor(codes, scales, zeros, bits, group)


def activations(t, k, seed=1):
    return np.random.default_rng(seed).standard_normal((t, k)).astype(np.float32)


def exact(weight, x):
    dense = weight.dequantize(np.float64) if isinstance(weight, QTensor) else weight.astype(np.float64)
    return x.astype(np.float64) @ dense.T


def nmse(found, expected):
    """Of the worst row."""
    error, power = ((found - expected) ** 2).sum(-1), (expected**2).sum(-1)
    assert (found[power == 0] == 0).all()
    return (error[power > 0] / power[power > 0]).max(initial=0)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", FLOATS)
def test_unpacking_gives_back_what_was_packed(isa, scale_dtype):
    for (n, k, group), bits in itertools.product(SHAPES, BITS):
        weight = qtensor(n, k, group, scale_dtype=scale_dtype, bits=bits)
        (found,) = PackedLinear.pack(weight, isa).unpack().segments
        assert same(found.codes, weight.codes) and same(found.zeros, weight.zeros) and same(found.scales, weight.scales)
        assert (found.bits, found.group_size) == (bits, group)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpacking_gives_back_float_weights(isa, dtype):
    for n, k, _ in SHAPES:
        bits = np.random.default_rng(n).integers(0, 256, n * k * np.dtype(dtype).itemsize, dtype=np.uint8)
        weight = bits.view(dtype).reshape(n, k)  # NaN payloads, infinities and subnormals among them
        assert same(PackedLinear.pack(weight, isa).unpack().segments[0], weight)


def test_packing_in_slices_gives_the_same_bytes(isa):
    weight = qtensor(70, 300, 128)
    whole = PackedLinear.pack(weight, isa).segments[0]
    pieces = np.full_like(whole.data, 0xAA)
    buffer = cpu_linear.aligned(pieces.nbytes)
    for begin, end in ((3, 5), (0, 1), (1, 3)):
        addresses = (a.ctypes.data for a in (weight.codes, weight.scales, weight.zeros))
        cpu.pack(isa, whole.shape, *addresses, buffer.ctypes.data, begin, end)
    assert same(buffer, whole.data)


# ---- quantized results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_equal_float64(isa, shape, bits, activation_bits):
    weight, x = qtensor(*shape, bits=bits), activations(33, shape[1])
    packed = PackedLinear.pack(weight, isa, activation_bits)
    expected = exact(weight, x)
    whole = linear(packed, x)
    assert ((whole - expected) ** 2).sum() <= (1e-7 if activation_bits == 16 else 5e-4) * (expected**2).sum()
    for rows in (*range(1, 14), 16):
        assert same(linear(packed, x[:rows]), whole[:rows]), f"{rows} rows"


@pytest.mark.parametrize("bits", (4, 8))
def test_a_whole_row_of_codes_in_8_bit_activations(isa, bits):
    """The figure of the claim: NMSE of one wide layer with a scale per row, on normal activations."""
    weight, x = qtensor(48, 11008, 11008, bits=bits), activations(3, 11008)
    assert nmse(linear(PackedLinear.pack(weight, isa, 8), x), exact(weight, x)) < 5e-4


def heavy_tailed(t, k):
    return np.random.default_rng(4).laplace(size=(t, k)).astype(np.float32)


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("bits", BITS)
def test_levels_give_the_same_bits(isa, bits, activation_bits):
    """Sums of integers are exact, and all vector levels add the blocks in one order with fused multiplications.

    The portable level has none, and differs in the last bits.
    """
    for n, k, group in ((50, 1000, 128), (33, 172, 32), (17, 1100, 1100), (24, 700, 200), (20, 300, 8)):
        weight = qtensor(n, k, group, bits=bits)
        for x in (activations(9, k), one_huge(activations(5, k)), heavy_tailed(5, k), saturated(activations(2, k))):
            found = linear(PackedLinear.pack(weight, isa, activation_bits), x)
            scalar = linear(PackedLinear.pack(weight, "scalar", activation_bits), x)
            assert nmse(found, scalar.astype(np.float64)) < 1e-12
            if isa != "scalar":
                assert same(found, linear(PackedLinear.pack(weight, ISAS[-2], activation_bits), x))


@pytest.mark.parametrize("activation_bits", (16, 8))
def test_activations_are_the_same_bytes_at_every_level(isa, activation_bits):
    if isa == "neon" and activation_bits == 16:
        pytest.skip("words in place of bytes, and a sum of them beside: the products tell whether they are right")
    for k, group in ((1000, 128), (1000, 1000), (700, 200), (100, 33)):
        x = np.concatenate(
            [activations(4, k), heavy_tailed(4, k), one_huge(activations(2, k)), np.zeros((1, k), np.float32)]
        )
        shape = cpu.LinearShape(cpu.WeightType.quantized, 16, k, group, False, 4, activation_bits)
        prepared = []
        for level in (isa, "scalar"):
            buffer = cpu_linear.aligned(cpu.activation_bytes(level, shape) * len(x))
            buffer[:] = 0  # outliers that are not there, and padding, are left alone
            cpu.prepare(level, shape, x.ctypes.data, buffer.ctypes.data, len(x))
            reordered = isa in ("dotprod", "i8mm") and activation_bits == 16  # within a row
            prepared.append(np.sort(buffer.reshape(len(x), -1)) if reordered else buffer)
        assert same(*prepared)


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("k, group", ((1000, 128), (1100, 1100), (700, 200), (768, 256), (100, 32)))
def test_a_row_may_be_prepared_in_parts(isa, k, group, activation_bits):
    x = one_huge(activations(2, k))
    shape = cpu.LinearShape(cpu.WeightType.quantized, 16, k, group, False, 4, activation_bits)
    whole, parts = (cpu_linear.aligned(cpu.activation_bytes(isa, shape) * 2) for _ in range(2))
    whole[:] = parts[:] = 0
    cpu.prepare(isa, shape, x.ctypes.data, whole.ctypes.data, 2)
    step = cpu.prepare_step(isa, shape)
    assert step < k
    for begin in reversed(range(0, k, step)):
        cpu.prepare(isa, shape, x.ctypes.data, parts.ctypes.data, 2, begin, min(begin + step, k))
    assert same(whole, parts)


def test_the_largest_sums_do_not_overflow(isa):
    """Codes and integers at their ends, with both signs: int16 and int32 sums at their largest."""
    for bits in BITS:
        for sign in (1, -1):
            x = np.full((13, 512), np.float32(sign))
            for group in (128, 512):
                weight = qtensor(70, 512, group, bits=bits)
                weight.codes[:], weight.zeros[:] = 2**bits - 1, 0
                for activation_bits in (16, 8):
                    found = linear(PackedLinear.pack(weight, isa, activation_bits), x)
                    np.testing.assert_allclose(found, exact(weight, x), rtol=1e-5)


@pytest.mark.parametrize("scale_dtype", (np.float32, bfloat16))
def test_codes_with_wide_scales(isa, scale_dtype):
    for (n, k, group), bits in itertools.product(SHAPES[3:8], BITS):
        weight, x = qtensor(n, k, group, scale_dtype=scale_dtype, bits=bits), activations(13, k)
        for activation_bits, bound in ((16, 1e-6), (8, 5e-4)):
            packed = PackedLinear.pack(weight, isa, activation_bits)
            found = linear(packed, x)
            assert nmse(found, exact(weight, x)) < bound
            assert same(linear(packed, x[:5]), found[:5])


@pytest.mark.parametrize("bits, kept", ((1, 2), (5, 8), (7, 8)))
def test_other_widths_are_kept_in_the_next(isa, bits, kept):
    weight, x = qtensor(20, 256, 64, bits=bits), activations(3, 256)
    packed = PackedLinear.pack(weight, isa)
    assert packed.segments[0].shape.bits == kept
    assert nmse(linear(packed, x), exact(weight, x)) < 1e-6
    assert packed.unpack().segments[0].bits == bits


@pytest.mark.parametrize(
    "bits, group, resident",
    ((4, 128, 4.1875), (3, 128, 3.1875), (3, 64, 3.375), (2, 64, 2.375), (2, 32, 2.75), (2, 4096, 2 + 32 / 4096)),
)
def test_codes_take_the_bytes_they_claim(isa, bits, group, resident):
    """Code, fp16 scale and zero of a byte; nothing is lost to padding where sizes are usual ones."""
    packed = PackedLinear.pack(qtensor(64, 4096, group, bits=bits), isa)
    assert packed.nbytes * 8 / (64 * 4096) == resident


def saturated(x):
    return np.where(x > 0, np.float32(65504), np.float32(-65504))


def all_saturated(x):
    return np.full_like(x, 65504)


def one_huge(x):
    x = x.copy()
    x[:, x.shape[1] // 2] = 65504
    return x


def one_huge_among_tiny(x):
    x = x * np.float32(1e-4)
    x[:, -1] = -65504
    return x


def a_spike(x):
    spike = np.zeros_like(x)
    spike[:, x.shape[1] // 3] = 3
    return spike


def one_sign(x):
    return np.abs(x) + np.float32(100)


def far_apart(x):
    """Each value of a size of its own, over eight decades."""
    return x * np.float32(10) ** np.random.default_rng(5).uniform(-4, 4, x.shape).astype(np.float32)


def whole_range(x):
    """Rows of very small and of very large values."""
    return x * np.float32(10) ** np.linspace(-25, 25, len(x), dtype=np.float32)[:, None]


@pytest.mark.parametrize("group", (32, 64, 128, 11008))
@pytest.mark.parametrize(
    "twist",
    (saturated, all_saturated, one_huge, one_huge_among_tiny, a_spike, one_sign, far_apart, whole_range, np.zeros_like),
    ids=lambda f: f.__name__,
)
def test_adversarial_activations(isa, group, twist):
    k = 11008 if group == 11008 else 1000
    for bits in BITS:
        weight, x = qtensor(67, k, group, bits=bits), twist(activations(5, k))
        assert nmse(linear(PackedLinear.pack(weight, isa), x), exact(weight, x)) < 1e-6


@pytest.mark.parametrize("group, huge", ((8, 1), (32, 1), (32, 2), (64, 4), (128, 1), (128, 2), (128, 8), (11008, 8)))
@pytest.mark.parametrize("size", (100, 65504, 1e20))
def test_a_huge_activation_without_weight_leaves_the_small_ones(isa, group, huge, size):
    """The columns of the huge values hold their zero points: the result is carried by the others alone."""
    k = 11008 if group == 11008 else 1024
    weight, x = qtensor(67, k, group), activations(5, k)
    for begin in range(0, k, min(group, 128)):
        columns = begin + np.arange(huge) * 3
        weight.codes[:, columns] = weight.zeros[:, columns // group]
        x[:, columns] = np.float32(size) * np.sign(x[:, columns])
    assert nmse(linear(PackedLinear.pack(weight, isa), x), exact(weight, x)) < 1e-6


@pytest.mark.parametrize("group", (32, 128, 512))
def test_q4_with_adversarial_weights(isa, group):
    k = 512
    x = activations(5, k)
    weight = qtensor(33, k, group)
    weight.codes[:, :group] = np.repeat(weight.zeros[:, :1], group, axis=1)  # a group of zeros
    weight.codes[3], weight.zeros[3] = 15, 0  # constant rows: all the largest, all the smallest, all zero
    weight.codes[4], weight.zeros[4] = 0, 15
    weight.codes[5], weight.zeros[5] = 7, 7
    weight.scales[6] = 0
    weight.scales[7] = np.float16(6e-8)  # the smallest subnormal
    weight.scales[8] = -weight.scales[8]
    found, expected = linear(PackedLinear.pack(weight, isa), x), exact(weight, x)
    assert nmse(found, expected) < 1e-6
    assert (found[:, 5] == 0).all() and (found[:, 6] == 0).all()
    assert nmse(found[:, 7:8].T, expected[:, 7:8].T) < 1e-6


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_what_is_not_finite_stays_so(isa, bad):
    kinds = (qtensor(17, 300, 128), 16), (qtensor(17, 300, 300, bits=8), 8), (np.ones((17, 300), np.float16), 16)
    for weight, activation_bits in kinds:
        x = activations(13, 300)
        packed = PackedLinear.pack(weight, isa, activation_bits)
        clean = linear(packed, x)
        x[2, 290] = bad
        found = linear(packed, x)
        assert not np.isfinite(found[2]).any()
        assert same(np.delete(found, 2, axis=0), np.delete(clean, 2, axis=0))


# ---- other types -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_weights_equal_float64(isa, dtype):
    for n, k, _ in SHAPES:
        weight, x = activations(n, k, seed=3).astype(dtype), activations(9, k)
        expected, packed = exact(weight, x), PackedLinear.pack(weight, isa)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9):
            found = linear(packed, x[:rows])
            assert ((found - expected[:rows]) ** 2).sum() <= 1e-11 * (expected[:rows] ** 2).sum(), (n, k, rows)


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormal_weights_count(isa, dtype):
    info_bits = {np.float32: 23, np.float16: 10, bfloat16: 7}[dtype]
    unsigned = np.uint32 if dtype is np.float32 else np.uint16
    patterns = np.random.default_rng(2).integers(1, 2**info_bits, (20, 50)).astype(unsigned)
    weight = patterns.view(dtype)
    x = activations(3, 50) * np.float32(2) ** 100 if dtype is not np.float16 else activations(3, 50)
    assert nmse(linear(PackedLinear.pack(weight, isa), x), exact(weight, x)) < 1e-11


# ---- slices, neighbours and borders ----------------------------------------------------------------------------------

WEIGHTS = {
    "q4": lambda n=75: qtensor(n, 300, 128),
    "q4-wide": lambda n=75: qtensor(n, 300, 300, scale_dtype=np.float32),
    "q8": lambda n=75: qtensor(n, 300, 128, bits=8),
    "q3": lambda n=75: qtensor(n, 300, 100, bits=3),
    "q2": lambda n=75: qtensor(n, 300, 128, bits=2),
    "f32": lambda n=75: activations(n, 301),
    "f16": lambda n=75: activations(n, 301).astype(np.float16),
    "bf16": lambda n=75: activations(n, 301).astype(bfloat16),
}


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_row_does_not_depend_on_its_neighbours(isa, kind, activation_bits):
    packed = PackedLinear.pack(WEIGHTS[kind](), isa, activation_bits)
    x = activations(150, packed.shape[1])  # so many that they go in several panels
    x[::3] = one_huge(x[::3])
    x[::5] = far_apart(x[::5])
    whole = linear(packed, x)
    for begin, end in ((0, 1), (1, 3), (3, 10), (10, 27), (27, 150)):
        assert same(linear(packed, x[begin:end]), whole[begin:end])


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("bits", BITS)
def test_more_k_than_a_panel_of_rows_holds(isa, bits, activation_bits):
    if isa == "scalar":
        pytest.skip("it has no panels")
    k = 28100
    packed = PackedLinear.pack(qtensor(81, k, 128, bits=bits), isa, activation_bits)
    x = activations(35, k)
    x[::3] = one_huge(x[::3])
    x[5, 1] = np.nan
    alone = np.concatenate([linear(packed, row[None]) for row in x])
    for rows in (*range(2, 18), 24, 33, 35):
        assert same(linear(packed, x[:rows]), alone[:rows])


@pytest.mark.parametrize("fetch", ("near", "none", "two"))
@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("kind", (*WEIGHTS, "q4-chunks", "q8-chunks", "q3-wide-chunks", "q8-long", "q2-long"))
def test_asking_for_weights_ahead_changes_no_bit(isa, kind, activation_bits, fetch):
    """Of one row with outliers, one with NaN and usual ones, alone and together."""
    if not cpu.asks(isa):
        pytest.skip("this level asks in one way")
    chunks = {  # more groups than have their scales in one place
        "q4-chunks": lambda n: qtensor(n, 1100, 128),
        "q8-chunks": lambda n: qtensor(n, 1100, 64, bits=8),
        "q3-wide-chunks": lambda n: qtensor(n, 1100, 128, bits=3, scale_dtype=np.float32),
        # tiles so large that few of them are not taken in pairs
        "q8-long": lambda n: qtensor(n, 4096, 128, bits=8),
        "q2-long": lambda n: qtensor(n, 16384, 64, bits=2),
    }
    # tiles in pairs and one more, the last of them whole or in part
    for n in (150, 75) if kind.endswith("long") else (150, 75, 50, 33):
        packed = PackedLinear.pack((WEIGHTS | chunks)[kind](n), isa, activation_bits)
        (segment,) = packed.segments
        x = activations(8, packed.shape[1])
        x[::2] = one_huge(x[::2])
        x[3, 5] = np.nan
        parts = [x[:rows] for rows in (2, 3, 4, 8)] + [row[None] for row in x]
        far = [linear(packed, part) for part in parts]
        segment.shape.two_tiles = fetch == "two"
        segment.shape.fetch = getattr(cpu.Fetch, "none" if fetch == "two" else fetch)
        for part, found in zip(parts, far, strict=True):
            assert same(linear(packed, part), found)


def run_slices(isa, segment, x, y, slices):
    bytes_per_row = cpu.activation_bytes(isa, segment.shape)
    prepared = cpu_linear.aligned(bytes_per_row * len(x))
    cpu.prepare(isa, segment.shape, x.ctypes.data, prepared.ctypes.data, len(x))
    for begin, end in slices:
        address, stride = y.ctypes.data, y.strides[0] // 4
        cpu.linear(
            isa, segment.shape, segment.data.ctypes.data, prepared.ctypes.data, len(x), begin, end, address, stride
        )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_slices_fill_their_rows_and_nothing_else(isa, kind):
    (segment,) = (packed := PackedLinear.pack(WEIGHTS[kind](), isa)).segments
    n, k = packed.shape
    x = activations(13, k)
    whole = linear(packed, x)
    slicings = (
        [(0, 5)],
        [(4, 5), (0, 2), (2, 4)],
        [(1, 4), (4, 5), (0, 1)],
        [(i, i + 1) for i in range(5)],
        [(2, 2), (0, 5)],
    )
    for rows, slices in itertools.product((13, 1), slicings):
        segment.shape.two_tiles = rows == 1
        segment.shape.fetch = cpu.Fetch.none if rows == 1 else cpu.Fetch.far
        y = np.full((rows, n + 7), np.float32(-12345))
        run_slices(isa, segment, x[:rows], y, slices)
        assert same(np.ascontiguousarray(y[:, :n]), whole[:rows])
        assert (y[:, n:] == -12345).all()
    y = np.full((13, n + 7), np.float32(-12345))
    run_slices(isa, segment, x, y, [(1, 2)])
    assert (np.delete(y, slice(16, 32), axis=1) == -12345).all()


class Fenced:
    """Memory that ends, or begins, at a page which may not be touched."""

    def __init__(self, nbytes, at_end):
        page = mmap.PAGESIZE
        size = -(-nbytes // page) * page
        self.map = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        fence = start + size if at_end else start
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), page, 0) == 0
        self.address = fence - nbytes if at_end else start + page
        self.fence = fence

    def put(self, array):
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)
        return self.address

    def free(self):
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.fence), mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(platform.system() != "Linux", reason="mprotect as Linux has it")
@pytest.mark.parametrize("at_end", (True, False))
def test_nothing_outside_the_buffers_is_touched(isa, at_end):
    weights = (
        *(make() for make in WEIGHTS.values()),
        *(qtensor(*shape, bits=b) for b in BITS for shape in ((1, 1, 1), (3, 9, 4))),
    )
    far, near, none = cpu.Fetch.__members__.values()
    asked = [(1, far, False), (1, near, False), (1, none, False), (1, none, True), (7, far, False), (13, far, False)]
    for weight, (rows, fetch, two), activation_bits in itertools.product(weights, asked, (16, 8)):
        (segment,) = (packed := PackedLinear.pack(weight, isa, activation_bits)).segments
        segment.shape.fetch, segment.shape.two_tiles = fetch, two
        n, k = packed.shape
        tiles = -(-n // 16)
        x = one_huge(activations(rows, k))
        arrays = (weight.codes, weight.scales, weight.zeros) if isinstance(weight, QTensor) else (weight,)
        fences = [Fenced(a.nbytes, at_end) for a in arrays]
        addresses = [f.put(a) for f, a in zip(fences, arrays, strict=True)] + [0, 0]
        to_pack = Fenced(segment.data.nbytes, at_end)
        to_prepare = Fenced(cpu.activation_bytes(isa, segment.shape) * rows, at_end)
        source, target = Fenced(x.nbytes, at_end), Fenced(rows * n * 4, at_end)
        cpu.pack(isa, segment.shape, *addresses[:3], to_pack.address, 0, tiles)
        cpu.unpack(isa, segment.shape, to_pack.address, *addresses[:3])
        cpu.prepare(isa, segment.shape, source.put(x), to_prepare.address, rows)
        cpu.linear(isa, segment.shape, to_pack.address, to_prepare.address, rows, 0, tiles, target.address, n)
        found = np.frombuffer(ctypes.string_at(target.address, rows * n * 4), np.float32).reshape(rows, n)
        assert same(found, linear(packed, x))
        for fence in (*fences, to_pack, to_prepare, source, target):
            fence.free()


@pytest.mark.skipif(platform.system() != "Linux", reason="mprotect as Linux has it")
@pytest.mark.parametrize("at_end", (True, False))
@pytest.mark.parametrize("n, blocks", [(1, 1), (16, 2), (21, 1)])
def test_nothing_outside_of_what_files_hold_is_read(isa, n, blocks, at_end):
    rng = np.random.default_rng(n)
    weights = [
        kind.read((rng.integers(0, 256, (n, blocks * kind.nbytes)) & 0x3F).astype(np.uint8))
        for kind in (gguf_file._KINDS[number] for number in (2, 8, 14))
    ]
    for bits, k in itertools.product(BITS, (8 * blocks, 40 * blocks + 3)):
        words = rng.integers(0, 2**31, (n, -(-k * bits // 32)), np.int32)
        grid = np.ones((n, -(-k // 32)), np.float16), np.ones((n, -(-k // 32)), np.uint8)
        weights += [bitstream.stream(stored, k, *grid, bits, 32) for stored in (words, np.asfortranarray(words))]
    for weight in weights:
        q = weight.tensor()
        kept = 8 if weight.bits == 6 else weight.bits
        wide = q.scales.dtype == np.float32
        shape = cpu.LinearShape(cpu.WeightType.quantized, *q.shape, weight.group_size, wide, kept)
        stored = weight.stored
        assert cpu.stored_bytes(getattr(cpu.Source, weight.source), q.shape[1], kept) == stored.nbytes // n
        flat = stored.T if stored.flags.f_contiguous else stored  # as it lies in memory
        arrays = np.ascontiguousarray(flat), q.scales, q.zeros
        fences = [Fenced(a.nbytes, at_end) for a in arrays]
        addresses = [f.put(a) for f, a in zip(fences, arrays, strict=True)]
        to_pack = Fenced(cpu.packed_bytes(isa, shape), at_end)
        strides = [stride // stored.itemsize for stride in stored.strides]
        cpu.pack(isa, shape, *addresses, to_pack.address, 0, -(-n // 16), getattr(cpu.Source, weight.source), *strides)
        codes, scales, zeros = (np.empty_like(a) for a in (q.codes, q.scales, q.zeros))
        cpu.unpack(isa, shape, to_pack.address, codes.ctypes.data, scales.ctypes.data, zeros.ctypes.data)
        assert np.array_equal(codes, q.codes)
        for fence in (*fences, to_pack):
            fence.free()


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_the_environment_forces_a_level(isa, monkeypatch):
    monkeypatch.setenv("TINYCHAT_ISA", isa)
    assert cpu.isa() == isa
    assert PackedLinear.pack(qtensor(3, 8, 8)).isa == isa
    monkeypatch.delenv("TINYCHAT_ISA")
    assert cpu.isa() == ISAS[0]
    monkeypatch.setenv("TINYCHAT_ISA", "mmx")
    with pytest.raises(BackendError, match=r"TINYCHAT_ISA=mmx does not run here; supported: .*scalar"):
        PackedLinear.pack(qtensor(3, 8, 8))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_levels_are_those_of_the_cpu(isa):
    needs: dict[str, set[str]] = {"scalar": set()}
    if platform.machine() in ("x86_64", "AMD64"):
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split())
        needs["avx2"] = {"avx2", "fma", "f16c"}
        needs["avxvnni"] = needs["avx2"] | {"avx_vnni"}
        needs["avx512"] = needs["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
        needs["avx512vnni"] = needs["avx512"] | {"avx512_vnni"}
        needs["amx"] = needs["avx512vnni"] | {"amx_tile", "amx_int8"}
    elif platform.machine() == "aarch64":
        told = ctypes.CDLL(None).getauxval  # /proc/cpuinfo is the host's where this is emulated
        told.argtypes, told.restype = [ctypes.c_ulong], ctypes.c_ulong
        flags = {name for name, key, bit in (("asimddp", 16, 20), ("i8mm", 26, 13)) if told(key) >> bit & 1}
        needs |= {"neon": set(), "dotprod": {"asimddp"}, "i8mm": {"asimddp", "i8mm"}}
    assert set(ISAS) == {name for name, needed in needs.items() if needed <= flags}


def test_objects_share_no_code_with_other_levels(isa):
    """A weak symbol in a level's object may be linked into the path of a CPU that cannot run it."""
    build = Path(__file__).resolve().parent.parent / "build"
    objects = [o for o in build.rglob("*.o") if f"level_{isa}." in str(o)]
    if not objects or not shutil.which("nm"):
        pytest.skip("no objects of this level, or no nm, at hand")
    for path in objects:
        symbols = subprocess.run(["nm", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
        weak = [line for line in symbols if line.split()[-2] in "vVwWu"]
        assert not weak, f"{path.name}: {weak}"


# ---- the wrapper -----------------------------------------------------------------------------------------------------


def test_fused_segments_of_mixed_precision(isa):
    segments = (
        qtensor(20, 64, 32),
        qtensor(9, 64, 32, bits=3),
        activations(7, 64).astype(bfloat16),
        qtensor(16, 64, 64, scale_dtype=np.float32),
    )
    bias = activations(1, 52)[0]
    packed = PackedLinear.pack(Linear(segments, bias), isa)
    x = activations(5, 64)
    expected = np.concatenate([exact(s, x) for s in segments], axis=1) + bias
    assert packed.shape == (52, 64) and nmse(linear(packed, x), expected) < 1e-6
    assert same(packed.unpack().bias, bias)


def test_arrays_need_not_be_contiguous(isa):
    whole = qtensor(20, 128, 32)
    weight = QTensor(whole.codes[::2], whole.scales[::2], whole.zeros[::2], 4, 32)
    x = activations(128, 6).T
    assert nmse(linear(PackedLinear.pack(weight, isa), x), exact(weight, x)) < 1e-6
    dense = activations(128, 20).T
    assert nmse(linear(PackedLinear.pack(dense, isa), x), exact(dense, x)) < 1e-11


def test_no_rows(isa):
    assert linear(PackedLinear.pack(qtensor(20, 64, 32), isa), np.empty((0, 64), np.float32)).shape == (0, 20)


def test_what_does_not_fit_is_refused(isa):
    packed = PackedLinear.pack(qtensor(20, 64, 32), isa)
    for x in (activations(2, 63), activations(2, 64)[0], activations(2, 64).astype(np.float64)):
        with pytest.raises(ValueError, match=r"fp32 \[T, 64\]"):
            linear(packed, x)
    with pytest.raises(BackendError, match="'sse9' does not run here"):
        PackedLinear.pack(qtensor(2, 8, 8), "sse9")
    with pytest.raises(ValueError, match="8 or 16 bits, not 4"):
        PackedLinear.pack(qtensor(2, 8, 8), isa, activation_bits=4)
    with pytest.raises(ValueError, match="codes up to 16, zeros up to 0; 4 bits hold 15"):
        PackedLinear.pack(
            QTensor(np.full((2, 8), 16, np.uint8), qtensor(2, 8, 8).scales, np.zeros((2, 1), np.uint8), 4, 8)
        )
    with pytest.raises(TypeError, match="float64"):
        PackedLinear.pack(np.ones((2, 8)), isa)
    with pytest.raises(ValueError, match="nothing to multiply"):
        PackedLinear.pack(np.ones((0, 8), np.float32), isa)
    with pytest.raises(ValueError, match="share K"):
        PackedLinear.pack(Linear((activations(2, 8), activations(2, 9))), isa)
    with pytest.raises(ValueError, match="a bias for 2 outputs"):
        PackedLinear.pack(Linear((activations(2, 8),), np.zeros(3, np.float32)), isa)
