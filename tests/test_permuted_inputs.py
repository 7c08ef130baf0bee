"""Act-order: columns of a weight that multiply inputs in an order of their own. And AWQ's act_scale, before `down`."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tinychat._cpu", reason="the compiled extension is not built")

from test_lowered_decoder import ISAS, MODELS, PLAIN, build, ids, model, nmse, quantized, reference

from tinychat.backends import cpu_linear
from tinychat.backends.cpu_linear import PackedLinear
from tinychat.cache import Rows
from tinychat.qtensor import QTensor
from tinychat.weights import LINEARS, Layer, Linear, MemoryWeights


def permuted(q: QTensor, seed: int) -> QTensor:
    order = np.random.default_rng(seed).permutation(q.shape[1]).astype(np.int32)
    return replace(q, permutation=order)


def changed(weights: MemoryWeights, change) -> MemoryWeights:
    return replace(weights, layers=[change(layer, i) for i, layer in enumerate(weights.layers)])


def in_own_orders(layer: Layer, index: int) -> Layer:
    """The segments of a linear differ: the first keeps its order, those after it share another."""

    def linear(name: str) -> Linear:
        found: Linear = getattr(layer, name)
        segments = list(found.segments)
        for i in range(0 if len(segments) == 1 else 1, len(segments)):
            if isinstance(segments[i], QTensor):
                segments[i] = permuted(segments[i], seed=100 * index + min(i, 1))
        return Linear(tuple(segments), found.bias)

    return replace(layer, **{name: linear(name) for name in LINEARS})


def test_dequantize_gives_the_natural_order():
    q = permuted(quantized(5, 70, 32, 0), 1)
    x = np.random.default_rng(2).standard_normal((3, 70))
    columns = replace(q, permutation=None).dequantize(np.float64)
    np.testing.assert_allclose(x @ q.dequantize(np.float64).T, x[:, q.permutation] @ columns.T)


@pytest.mark.parametrize("order", [np.arange(7), np.arange(8)[:, None], np.zeros(8), np.arange(8) + 1, np.arange(8.0)])
def test_what_is_no_permutation(order):
    q = quantized(3, 8, 4, 0)
    with pytest.raises(ValueError, match="a permutation of 8 inputs is int32 and names each once"):
        replace(q, permutation=order if order.dtype == float else order.astype(np.int32))


@pytest.mark.parametrize("n, k, group", [(33, 172, 32), (5, 172, 172), (16, 129, 128), (24, 700, 200), (19, 1100, 128)])
@pytest.mark.parametrize("isa", ISAS)
def test_one_linear_equals_float64(isa, n, k, group):
    q = permuted(quantized(n, k, group, 0), 1)
    x = np.random.default_rng(2).standard_normal((9, k)).astype(np.float32)
    packed = PackedLinear.pack(Linear((q, quantized(7, k, group, 3))), isa)
    expected = x @ np.concatenate([q.dequantize(np.float64), quantized(7, k, group, 3).dequantize(np.float64)]).T
    assert nmse(cpu_linear.linear(packed, x), expected) < 1e-8
    first, second = packed.unpack().segments
    assert np.array_equal(first.permutation, q.permutation) and np.array_equal(first.codes, q.codes)
    assert second.permutation is None


@pytest.mark.parametrize(
    "name, fields",
    [
        ("segments alike", {"weight": "q4", "bias": ("qkv",), "dim": 12, "hidden": 72, "inter": 131}),
        ("segments differ in precision too", {"weight": "mixed", "dim": 12, "hidden": 72, "inter": 131}),
        ("many pieces", {"weight": "q4", "group": 128, **MODELS["many pieces"]}),
        ("parallel, gelu", {"weight": "q4", **MODELS["parallel"]}),
    ],
)
@pytest.mark.parametrize("isa", ISAS)
def test_the_lowered_decoder_gathers(isa, name, fields):
    weights = changed(model(**fields), in_own_orders)
    tokens = ids(20, weights.config.vocab_size)
    expected = reference(weights, dtype="fp64").step(Rows.of(tokens, 0, wanted="all"))
    for threads in (1, 2):
        runner = build(weights, isa=isa, threads=threads)
        pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(tokens[:15], 0), (tokens[15:19], 15)]]
        pieces.append(runner.step(Rows.of(tokens[19:], 19)))
        assert nmse(np.concatenate(pieces), expected) < 1e-6
    natural = changed(weights, lambda layer, _: replace(layer, **{n: unordered(getattr(layer, n)) for n in LINEARS}))
    assert nmse(reference(natural, dtype="fp64").step(Rows.of(tokens, 0, wanted="all")), expected) > 0.1


def unordered(linear: Linear) -> Linear:
    parts = (replace(s, permutation=None) if isinstance(s, QTensor) else s for s in linear.segments)
    return Linear(tuple(parts), linear.bias)


def test_an_order_costs_its_bytes_once():
    plain = model(weight="q4")
    weights = changed(plain, in_own_orders)
    orders = 2 * 4 * (60 + 60 + 60 + 107)  # of qkv (k and v have the same), out, up's second half, down
    assert build(weights).weight_bytes == build(plain).weight_bytes + orders


SCALES = {
    "gelu": {"weight": "q4", **PLAIN},
    "gelu, parallel, many pieces": {**MODELS["many pieces"], **MODELS["parallel"]},
    "gated": {"weight": "q4"},
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("isa", ISAS)
def test_what_down_reads_is_divided_by_act_scale(isa, name):
    def scaled(layer: Layer, index: int) -> Layer:
        scale = np.random.default_rng(index).uniform(0.25, 4, layer.down.shape[1]).astype(np.float32)
        return replace(layer, act_scale=scale) if index == 1 else layer

    plain = model(**SCALES[name])
    weights = changed(plain, scaled)
    tokens = ids(20, weights.config.vocab_size)
    expected = reference(weights, dtype="fp64").step(Rows.of(tokens, 0, wanted="all"))
    runner = build(weights, isa=isa)
    pieces = [runner.step(Rows.of(part, at, wanted="all")) for part, at in [(tokens[:19], 0), (tokens[19:], 19)]]
    assert nmse(np.concatenate(pieces), expected) < 1e-6
    assert nmse(reference(plain, dtype="fp64").step(Rows.of(tokens, 0, wanted="all")), expected) > 1e-3
    combined = changed(weights, in_own_orders)
    expected = reference(combined, dtype="fp64").step(Rows.of(tokens, 0, wanted="all"))
    assert nmse(build(combined, isa=isa).step(Rows.of(tokens, 0, wanted="all")), expected) < 1e-6
