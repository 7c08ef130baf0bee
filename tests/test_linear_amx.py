"""Level amx gives the bits of level avx512vnni, whatever the sizes, the rows and the activations."""

import threading

import numpy as np
import pytest

from tinychat.backends import cpu_linear

cpu = pytest.importorskip("tinychat._cpu", reason="the compiled extension is not built")
if "amx" not in cpu.supported_isas().split():
    pytest.skip("no AMX here", allow_module_level=True)

# (N, K, group size)
SHAPES = (
    (33, 172, 32),
    (40, 192, 64),
    (17, 100, 100),
    (5, 172, 172),
    (70, 1000, 128),
    (24, 700, 200),
    (31, 1100, 1100),
    (129, 520, 8),
    (18, 11008, 11008),
)


class Case:
    """A random weight packed once for both levels, which share the layout, and how to multiply with it."""

    def __init__(self, shape, bits, activation_bits, symmetric=False, wide=False):
        n, k, group = shape
        rng = np.random.default_rng(n)
        groups = (n, -(-k // group))
        codes = rng.integers(0, 2**bits, (n, k), np.uint8)
        zeros = np.full(groups, 128, np.uint8) if symmetric else rng.integers(0, 2**bits, groups, np.uint8)
        scales = rng.uniform(0.001, 0.02, groups).astype(np.float32 if wide else np.float16)
        self.shape = cpu.LinearShape(cpu.WeightType.quantized, n, k, group, wide, bits, activation_bits)
        self.tiles = -(-n // cpu.tile("amx"))
        self.data = cpu_linear.aligned(cpu.packed_bytes("amx", self.shape))
        addresses = (a.ctypes.data for a in (codes, scales, zeros))
        cpu.pack("amx", self.shape, *addresses, self.data.ctypes.data, 0, self.tiles)

    def multiply(self, isa, x, begin=0, end=None):
        """y of the tiles begin .. end; the rest holds 7."""
        activations = cpu_linear.aligned(cpu.activation_bytes(isa, self.shape) * len(x))
        cpu.prepare(isa, self.shape, x.ctypes.data, activations.ctypes.data, len(x))
        y = np.full((len(x), self.shape.n + 3), np.float32(7))
        end = self.tiles if end is None else end
        address, stride = y.ctypes.data, y.strides[0] // 4
        cpu.linear(isa, self.shape, self.data.ctypes.data, activations.ctypes.data, len(x), begin, end, address, stride)
        return y


def activations(rows, k):
    """Normal values, rows of every kind among them: zero, saturated, with outliers, not finite."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[0] = np.where(x[0] > 0, np.float32(65504), np.float32(-65504))
    x[rows // 2, :: max(1, k // 9)] *= 1000
    if rows > 4:
        x[1], x[3] = 0, 65504
        x[2, k // 2], x[4, k - 1] = np.nan, np.inf
    return x


def same(a, b):
    return a.tobytes() == b.tobytes()


@pytest.mark.parametrize("activation_bits", (16, 8))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_avx512vnni(shape, bits, activation_bits):
    case = Case(shape, bits, activation_bits)
    for rows in (1, 2, 7, 8, 9, 12, 15, 16, 17, 23, 24, 31, 32, 33, 48, 70):
        x = activations(rows, shape[1])
        assert same(case.multiply("amx", x), case.multiply("avx512vnni", x)), f"{rows} rows"


@pytest.mark.parametrize("activation_bits", (16, 8))
def test_every_number_of_rows(activation_bits):
    case, x = Case((37, 300, 128), 3, activation_bits, wide=True), activations(70, 300)
    whole = case.multiply("avx512vnni", x)
    for rows in range(1, 71):
        assert same(case.multiply("amx", x[:rows]), whole[:rows])
    assert same(case.multiply("amx", x[5:]), whole[5:])


def test_a_symmetric_head_and_many_rows():
    case = Case((50, 1024, 128), 8, 16, symmetric=True)
    for rows in (130, 600):  # several panels
        x = activations(rows, 1024)
        assert same(case.multiply("amx", x), case.multiply("avx512vnni", x))


def test_more_blocks_than_a_panel_holds():
    case, x = Case((16, 20000, 8), 4, 16), activations(18, 20000)
    assert same(case.multiply("amx", x), case.multiply("avx512vnni", x))


def test_slices_of_tiles_fill_their_rows_and_nothing_else():
    case, x = Case((123, 300, 64), 4, 16), activations(40, 300)
    whole = case.multiply("avx512vnni", x)
    for begin, end in ((0, 1), (1, 6), (5, 8), (7, 8), (3, 3)):
        y = case.multiply("amx", x, begin, end)
        columns = slice(begin * 16, min(end * 16, 123))
        assert same(y[:, columns], whole[:, columns])
        assert (np.delete(y, np.r_[columns], axis=1) == 7).all()


def test_two_threads_at_once():
    cases = [Case((200, 1000, 128), 4, bits) for bits in (16, 8)]
    x = activations(50, 1000)
    expected = [case.multiply("avx512vnni", x) for case in cases]
    wrong = []

    def work(index):
        for _ in range(30):
            if not same(cases[index].multiply("amx", x), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
