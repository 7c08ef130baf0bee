"""The quantizer's kernels against PyTorch's formulas, at every level of this machine: rounding, limits, arithmetic."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tinychat._cpu", reason="needs the compiled kernels")
pytestmark = pytest.mark.usefixtures("one_thread")

from tinychat.backends import arithmetic  # noqa: E402
from tinychat.backends.cpu_linear import supported_isas  # noqa: E402
from tinychat.errors import CheckpointError  # noqa: E402
from tinychat.quantize import clip, dense  # noqa: E402
from tinychat.quantize.dense import Dense, DenseOps  # noqa: E402
from tinychat.quantize.grid import Grid  # noqa: E402

LEVELS = [isa for isa in supported_isas() if isa != "scalar"]
SHAPES = [(37, 300, 128), (19, 256, 64), (13, 130, -1), (6, 75, 7), (12, 96, 32)]  # N, K, group size


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    monkeypatch.setenv("TINYCHAT_ISA", request.param)
    assert arithmetic.engine().clips()
    return request.param


@pytest.fixture
def pytorch(monkeypatch):
    """Calls a function without the kernels."""

    def without(function, *given):
        with monkeypatch.context() as patch:
            patch.setattr(arithmetic, "engine", lambda: None)
            return function(*given)

    return without


def weights(n: int, k: int) -> torch.Tensor:
    """Of many sizes; rows of zeros, of one value, of one sign, huge, small for fp16 and too small for it."""
    w = torch.randn(n, k) * torch.rand(n, 1)
    w[0], w[1], w[2] = 0.0, -1.5, w[2].abs()
    w[3] *= 1e4
    w[4] *= 3e-6
    w[5] *= 1e-9
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (2, False), (3, True), (8, False)])
def test_rounding_gives_the_same_numbers(level, pytorch, shape, bits, symmetric):
    torch.manual_seed(bits)
    n, k, group = shape
    grid, w = Grid(bits, group, symmetric), weights(n, k)
    grouped = grid.grouped(w)
    limits = torch.stack((grouped.amin(-1), grouped.amax(-1)), -1)
    limits *= 0.4 + 0.7 * torch.rand(limits.shape)
    divisors = torch.rand(k) + 0.5
    for given in ((None, None), (limits, None), (None, divisors), (limits, divisors)):
        made, out = grid.round_trip(w, "w", *given), torch.full((n + 2, k), -5.0)
        assert torch.equal(made, pytorch(grid.round_trip, w, "w", *given))
        assert grid.round_trip(w, "w", *given, out[1:-1]) is not None
        assert torch.equal(out[1:-1], made) and (out[[0, -1]] == -5).all()
    assert torch.equal(grid.round_trip(w), torch.from_numpy(grid.quantize(w).dequantize()))


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), "not finite"), (float("-inf"), "not finite"), (2e6, "fp16")]
)
def test_what_cannot_be_rounded_is_an_error(level, value, error):
    w = torch.randn(9, 130)
    w[7, 129] = value
    with pytest.raises(CheckpointError, match=f"layer.up.*{error}"):
        Grid(4, 64).round_trip(w, "layer.up")
    with pytest.raises(CheckpointError, match=f"layer.up.*{error}"):
        clip.search(Grid(4, 64), w, torch.randn(20, 130), name="layer.up")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "symmetric", "drifts"), [(4, False, True), (3, False, False), (2, True, True)])
def test_limits_are_those_of_the_formula(level, pytorch, shape, bits, symmetric, drifts):
    torch.manual_seed(bits)
    n, k, group = shape
    grid, w = Grid(bits, group, symmetric), weights(n, k)
    x = torch.randn(60, k) * torch.rand(k)
    apart = torch.randn(60, n) if drifts else None

    def losses(limits):
        error = (grid.round_trip(w, "w", limits) - w).double() @ x.double().T
        return (error if apart is None else error + apart.double().T).square().sum(1)

    for find in (clip.glance, clip.search):
        found, expected = find(grid, w, x, apart), pytorch(find, grid, w, x, apart)
        assert (found == expected).float().mean() > 0.98  # of two as good as each other either may be taken
        ours, theirs = losses(found), losses(expected)
        assert torch.allclose(ours, theirs, rtol=0.02) and torch.allclose(ours.sum(), theirs.sum(), rtol=1e-3)
        assert (ours <= losses(None) * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 5, 7), (9, 33, 48), (150, 70, 300), (40, 16, 1030)])
def test_arithmetic_are_exact_however_they_are_cut(level, dtype, rows, n, k):
    torch.manual_seed(rows)
    x, w = torch.randn(rows, k), torch.randn(n, k).to(dtype)
    product, y = arithmetic.Product(arithmetic.engine(), x), torch.full((rows, n + 8), -5.0)
    product.into(y[:, 3 : 3 + n], w)
    exact = x.double() @ w.double().T
    assert (y[:, 3 : 3 + n].double() - exact).square().sum() < 1e-12 * exact.square().sum()
    assert (y[:, :3] == -5).all() and (y[:, 3 + n :] == -5).all()
    for first in range(n):
        one = torch.empty(rows, 1)
        product.into(one, w[first : first + 1])
        assert np.array_equal(one[:, 0], y[:, 3 + first])


@pytest.mark.skipif("avx2" not in LEVELS, reason="the kernel is used on a CPU of AVX2 alone")
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_a_linear_is_pytorchs(monkeypatch, rows):
    """Of several segments, one of which stays as it is; rounded on the way; on two threads, in several cuts."""
    monkeypatch.setenv("TINYCHAT_ISA", "avx2")
    monkeypatch.setattr(dense, "MULTIPLIED", 2000)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    grid, weight = Grid(4, 32), torch.randn(90, 70).half()
    plain = Dense("qkv", weight, torch.randn(90), (50, 23, 17), ("q", "k", "v"), (None, "kept", None))
    x, columns = torch.randn(rows, 70), torch.rand(70) + 0.5
    assert arithmetic.multiplier(x)
    for linear in (plain, plain.scaled(columns), plain.scaled(columns).rounded(grid, columns)):
        for ops in (DenseOps(), DenseOps(grid=grid)) if linear.grid is None else (DenseOps(),):
            used = linear if ops._grid is None else linear.rounded(grid)
            exact = x.double() @ used.weight.double().T + linear.bias
            assert torch.allclose(ops.linear(x, linear).double(), exact, atol=1e-4)


def test_without_kernels_it_is_pytorch(monkeypatch):
    monkeypatch.setenv("TINYCHAT_ISA", "scalar")
    assert not arithmetic.engine().clips() and arithmetic.multiplier(torch.zeros(1, 1)) is None
    w = weights(9, 64)
    assert torch.equal(Grid(4, 32).round_trip(w), torch.from_numpy(Grid(4, 32).quantize(w).dequantize()))
    clip.search(Grid(4, 32), w, torch.randn(20, 64))
