"""Linears on the CUDA kernels against float64: on the CPU through tinychat._cuda_host, and with `-m gpu` on a GPU."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest

# oneDNN multiplies bf16 by instructions that some virtual machines show and do not run.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
torch = pytest.importorskip("torch")

from tinychat.backends import cuda_linear  # noqa: E402
from tinychat.backends.cuda_linear import CudaLinear, Dense, Quantized, extension  # noqa: E402
from tinychat.checkpoint import bitstream  # noqa: E402
from tinychat.qtensor import AwqWords, QTensor, bfloat16, pack_words  # noqa: E402
from tinychat.weights import Linear  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NMSE = {"fp16": 1e-6, "bf16": 1e-5}
# fp32 sums of exact products: before y is rounded there is no other error. A GPU's tensor cores cut off what they add.
SUMS = {"cpu": 1e-12, "cuda": 1e-11}
ON_HOST = pytest.param("cpu")
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
rng = np.random.default_rng()  # fresh data at every run: what fails prints its error


@pytest.fixture(params=[ON_HOST, ON_GPU])
def device(request) -> torch.device:
    return ready(request.param)


@pytest.fixture(params=[ON_GPU])
def gpu(request) -> torch.device:
    return ready(request.param)


def ready(name: str) -> torch.device:
    """A device that has kernels, or a skip."""
    if name == "cpu":
        pytest.importorskip("tinychat._cuda_host", reason="not built: cmake -DTINYCHAT_CUDA_HOST=ON")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, or a PyTorch without CUDA")
    return torch.device("cuda", 0)


def weight(n: int, k: int, group: int, bits: int = 4, scales=np.float16) -> QTensor:
    grid = (n, -(-k // group))
    return QTensor(
        rng.integers(0, 2**bits, (n, k), dtype=np.uint8),
        (rng.uniform(0.001, 0.02, grid) * rng.choice([1, 8], grid)).astype(scales),
        rng.integers(0, 2**bits, grid, dtype=np.uint8),
        bits,
        group,
    )


def inputs(rows: int, k: int, dtype: str, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((rows, k))).to(device, DTYPES[dtype])


def exact(linear: Linear, x: torch.Tensor) -> np.ndarray:
    """x W^T + b in float64."""
    parts = [s.dequantize(np.float64) if isinstance(s, QTensor) else s.astype(np.float64) for s in linear.segments]
    y = x.double().cpu().numpy() @ np.concatenate(parts).T
    return y if linear.bias is None else y + linear.bias


def nmse(got: torch.Tensor, want: np.ndarray) -> float:
    found = got.double().cpu().numpy()
    assert found.shape == want.shape and np.isfinite(found).all()
    return float(((found - want) ** 2).sum() / max((want**2).sum(), 1e-30))


def same(a: QTensor, b: QTensor) -> bool:
    numbers = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros"))
    orders = (a.permutation is None) == (b.permutation is None)
    if orders and a.permutation is not None:
        orders = np.array_equal(a.permutation, b.permutation)
    kinds = (a.bits, a.group_size, a.scales.dtype) == (b.bits, b.group_size, b.scales.dtype)
    return numbers and orders and kinds


def name_of(shape: tuple) -> str:
    n, k, group, bits, *scales = shape
    return f"{n}x{k}-g{group}-{bits}bit" + "".join(f"-{np.dtype(dtype).name}" for dtype in scales)


SHAPES = [  # n, k, group, bits, scales
    (16, 64, 64, 4, np.float16),
    (1, 1, 1, 4, np.float16),
    (17, 70, 32, 4, np.float16),
    (40, 200, 64, 3, np.float32),
    (33, 257, 128, 2, bfloat16),
    (50, 333, 333, 4, np.float16),
    (24, 288, 96, 4, np.float16),
    (48, 320, 160, 8, np.float16),
    (31, 129, 32, 8, bfloat16),
    (20, 100, 128, 8, np.float16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_packing_loses_nothing(device, shape):
    q = weight(*shape)
    (found,) = CudaLinear.pack(q, device).unpack().segments
    assert same(q, found)


def test_packing_is_done_in_slabs(device, monkeypatch):
    segments = weight(40, 96, 32), weight(9, 96, 32), weight(56, 96, 32)
    whole = CudaLinear.pack(Linear(segments), device)
    monkeypatch.setattr("tinychat.backends.cuda_packing._SLAB", 32 * 96)
    parts = CudaLinear.pack(Linear(segments), device)
    assert torch.equal(whole.parts[0].packed.codes, parts.parts[0].packed.codes)
    assert all(same(a, b) for a, b in zip(segments, parts.unpack().segments, strict=True))


def test_awq_words_are_packed_as_the_codes_they_hold(device, monkeypatch):
    monkeypatch.setattr("tinychat.backends.cuda_packing._SLAB", 48 * 256)
    q = weight(104, 256, 64)
    words = AwqWords(pack_words(q.codes), pack_words(q.zeros), np.ascontiguousarray(q.scales.T))
    a, b = (CudaLinear.pack(w, device).parts[0].packed for w in (q, words))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)


@pytest.mark.parametrize("bits", [3, 8])
def test_a_stream_is_packed_as_the_codes_it_holds(device, bits):
    q = weight(104, 256, 64, bits=bits)
    stream = bitstream.stream(bitstream.pack_bits(q.codes, bits), 256, q.scales, q.zeros, bits, 64)
    a, b = (CudaLinear.pack(w, device).parts[0].packed for w in (q, stream))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales) and torch.equal(a.zeros, b.zeros)


def test_the_words_are_in_the_order_of_the_header(device):
    """Codes 0 .. 7 where the header's drawing says 0 .. 7: 0, 2, 4, 6, 1, 3, 5, 7 in a word."""
    codes = np.zeros((16, 64), np.uint8)
    for h in range(2):
        for lower in range(2):
            for e in range(2):
                codes[8 * lower + 5, 32 + 8 * 3 + 4 + 2 * h + e] = 4 * h + 2 * lower + e  # half 1, t 3, its step 1
    q = QTensor(codes, np.ones((16, 1), np.float16), np.zeros((16, 1), np.uint8), 4, 64)
    words = CudaLinear.pack(q, device).parts[0].packed.codes.cpu().numpy().view(np.uint32).reshape(32, 4)
    assert words[5 * 4 + 3, 3] == 0x75316420 and np.count_nonzero(words) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 64])
def test_linear(device, dtype, shape, rows):
    q = weight(*shape)
    linear = Linear((q,), None if rows % 2 else rng.standard_normal(shape[0]).astype(np.float32))
    packed, x = CudaLinear.pack(linear, device, DTYPES[dtype]), inputs(rows, shape[1], dtype, device)
    wide = packed(x, wide=True)
    assert nmse(wide, exact(linear, x)) <= SUMS[device.type]
    assert torch.equal(packed(x), wide.to(DTYPES[dtype]))  # rounded once: by itself up to 1.5e-5 of one bf16 number


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_way_to_share_the_work(device, dtype, bits):
    """gemv by any number of warps, gemm by any number of parts of K, rows of several blocks: the same sums."""
    n, k, guard = 140, 392, 7.25
    q = weight(n, k, 32, bits)
    packed = CudaLinear.pack(q, device, DTYPES[dtype])
    (part,), cuda = packed.parts, extension(device)
    kind = cuda.Dtype.f16 if dtype == "fp16" else cuda.Dtype.bf16
    sums = torch.empty(16 * 140 * n, device=device)
    kernels = [(cuda.gemv, rows, {"warps": warps}) for rows in (3, 11) for warps in (1, 4, 8, 16)]
    for rows in (12, 40, 70, 140):
        kernels += [
            (cuda.gemm, rows, {"parts": parts, "workspace": sums.data_ptr(), "workspace_bytes": sums.nbytes})
            for parts in (1, 3)
        ]
    for kernel, rows, options in kernels:
        x = inputs(rows, k, dtype, device)
        y = torch.full((rows, n + 5), guard, device=device)
        stream = cuda_linear.stream(device)
        kernel(part.weight, x.data_ptr(), 0, y.data_ptr() + 8, rows, k, n + 5, kind, True, stream, **options)
        assert nmse(y[:, 2 : n + 2], exact(Linear((q,)), x)) <= SUMS[device.type], (kernel, rows, options)
        assert (y[:, :2] == guard).all() and (y[:, n + 2 :] == guard).all(), (kernel, rows, options)


def test_the_order_of_threads_does_not_matter():
    cuda = extension(ready("cpu"))
    packed = CudaLinear.pack(weight(70, 328, 64), "cpu")
    for rows in (1, 9, 20, 70):
        x = inputs(rows, 328, "fp16", torch.device("cpu"))
        forward = packed(x)
        cuda.reverse(True)
        try:
            assert torch.equal(packed(x), forward)
        finally:
            cuda.reverse(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:], ids=name_of)
def test_dequantized_is_rounded_once(device, dtype, shape):
    q = weight(*shape)
    packed = CudaLinear.pack(q, device, DTYPES[dtype])
    got = packed.dequantized(packed.parts[0])
    want = torch.from_numpy(q.dequantize(np.float64)).to(torch.float32).to(DTYPES[dtype])
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_go_through_torch(device, dtype, monkeypatch):
    monkeypatch.setattr(cuda_linear, "DEQUANTIZE_ROWS", 20)
    linear = Linear((weight(40, 136, 64), weight(24, 136, 32)), rng.standard_normal(64).astype(np.float32))
    packed, x = CudaLinear.pack(linear, device, DTYPES[dtype]), inputs(21, 136, dtype, device)
    for wide in (False, True):
        assert nmse(packed(x, wide), exact(linear, x)) <= NMSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_mixed_kinds(device, dtype):
    k = 192
    order = rng.permutation(k).astype(np.int32)
    permuted = weight(20, k, 64)
    permuted = QTensor(permuted.codes, permuted.scales, permuted.zeros, 4, 64, order)
    values = rng.standard_normal((13, k)).astype(np.float16) * np.float16(0.1)
    segments = (
        weight(40, k, 64),
        weight(9, k, 64, bits=3),
        permuted,
        values,
        weight(30, k, 48),  # no kernel has groups of 48
        weight(18, k, 64, bits=8),
    )
    linear = Linear(segments, rng.standard_normal(130).astype(np.float32))
    packed = CudaLinear.pack(linear, device, DTYPES[dtype])
    assert [type(part) for part in packed.parts] == [Quantized, Quantized, Dense, Dense, Quantized]
    found = packed.unpack()
    for a, b in zip(segments, found.segments, strict=True):
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else same(a, b)
    assert np.array_equal(found.bias, linear.bias)
    for rows in (2, 20):
        x = inputs(rows, k, dtype, device)
        assert nmse(packed(x), exact(linear, x)) <= NMSE[dtype]


def test_inputs_may_be_a_view_and_large(device):
    q = weight(24, 72, 32)
    packed = CudaLinear.pack(q, device)
    for x in (inputs(3, 80, "fp16", device)[:, 3:75], inputs(72, 5, "fp16", device).T[1:]):
        assert nmse(packed(x), exact(Linear((q,)), x)) <= NMSE["fp16"]
    x = 60000 * inputs(3, 72, "fp16", device).sign()
    assert nmse(packed(x, wide=True), exact(Linear((q,)), x)) <= SUMS[device.type]
    assert packed(x[:0]).shape == (0, 24)


def test_what_is_refused(device):
    packed = CudaLinear.pack(weight(16, 64, 64), device)
    for x in (inputs(1, 63, "fp16", device), inputs(1, 64, "bf16", device), inputs(1, 64, "fp16", device)[0]):
        with pytest.raises(ValueError, match=r"activations are torch\.float16"):
            packed(x)
    with pytest.raises(ValueError, match="fp16 or bf16"):
        CudaLinear.pack(weight(16, 64, 64), device, torch.float32)
    with pytest.raises(ValueError, match="share K"):
        CudaLinear.pack(Linear((weight(16, 64, 64), weight(16, 65, 64))), device)
    codes = weight(16, 64, 64, bits=8)
    with pytest.raises(ValueError, match="codes up to"):
        CudaLinear.pack(QTensor(codes.codes, codes.scales, codes.zeros % 16, 4, 64), device)
    with pytest.raises(ValueError, match="zeros up to"):
        CudaLinear.pack(QTensor(codes.codes % 16, codes.scales, codes.zeros | 64, 4, 64), device)


GPU_SHAPES = [
    (4096, 4096, 128, 4),
    (11008, 4096, 128, 4),
    (4096, 11008, 128, 4),
    (1000, 2051, 32, 4),
    (4097, 3072, 64, 4),
    (2560, 4096, 4096, 4),
    (5003, 1024, 128, 8),
    (1024, 1000, 32, 8),
    (300, 96, 64, 4),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=name_of)
def test_linear_at_size(gpu, dtype, shape):
    linear = Linear((weight(*shape),), rng.standard_normal(shape[0]).astype(np.float32))
    packed = CudaLinear.pack(linear, gpu, DTYPES[dtype])
    plain = torch.from_numpy(linear.segments[0].dequantize(np.float64)).to(gpu)
    for rows in (*range(1, 10), 16, 17, 33, 64, 100, 128, 300, 511, 512, 2048):
        x = inputs(rows, shape[1], dtype, gpu)
        want = (x.double() @ plain.T + torch.from_numpy(linear.bias).to(gpu).double()).cpu().numpy()
        assert nmse(packed(x), want) <= NMSE[dtype], rows
        if rows < cuda_linear.DEQUANTIZE_ROWS:
            assert nmse(packed(x, wide=True), want) <= 1e-9, rows  # tensor cores add in fp32, but cut off


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_graph_replays_the_same_bits(gpu, rows):
    packed, x = CudaLinear.pack(weight(4096, 4096, 128), gpu), inputs(rows, 4096, "fp16", gpu)
    want = packed(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, want)


def test_kernels_that_begin_early_wait_for_what_they_read(gpu):
    """Each gemv of a chain reads what the one before wrote; on sm_90 it begins while that one ends."""
    layers = [CudaLinear.pack(weight(2048, 2048, 128), gpu) for _ in range(20)]

    def chain(x):
        for layer in layers:
            x = layer(x)
            x /= x.abs().amax() + 1  # another's kernel between two of ours
            x = layers[0](layer(x))
            x /= x.abs().amax() + 1
        return x

    cuda, x = extension(gpu), inputs(4, 2048, "fp16", gpu)
    cuda.overlap(False)
    try:
        want = chain(x)
        cuda.overlap(True)
        assert all(torch.equal(chain(x), want) for _ in range(5))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        for _ in range(20):
            graph.replay()
            assert torch.equal(y, want)
    finally:
        cuda.overlap(True)


def test_bf16_of_fp32_scales(device):
    """What neither fp16 nor bf16 holds: the scales stay fp32 in the kernels."""
    q = weight(32, 128, 64, scales=np.float32)
    tiny = QTensor(q.codes, q.scales * np.float32(1e-6), q.zeros, 4, 64)
    packed, x = CudaLinear.pack(tiny, device, torch.bfloat16), inputs(2, 128, "bf16", device)
    assert nmse(packed(x, wide=True), exact(Linear((tiny,)), x)) <= SUMS[device.type]
    assert packed.unpack().segments[0].scales.dtype == np.float32 and ml_dtypes.bfloat16 is bfloat16.type
