"""Scaling groups and the search: folding is exact, the loss never rises, salient channels are protected."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tinychat.backends import reference
from tinychat.cache import Rows
from tinychat.config import Activation, Block, ModelConfig, Norm, QKNorm, Rope
from tinychat.decoder import Context, block
from tinychat.errors import CheckpointError, UsageError
from tinychat.quantize import awq, quantize_in_memory
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import LINEARS, DenseOps, dense_layer
from tinychat.quantize.grid import Grid
from tinychat.quantize.groups import scaling_groups
from tinychat.quantize.report import BLOCK
from tinychat.weights import Layer, Linear, MemoryWeights, norm_sizes

ALL = frozenset({"qkv", "out", "up", "down"})
PLAIN = {"activation": Activation.GELU, "gated": False, "norm": Norm.LAYER}


def tiny_config(n_heads=6, n_kv_heads=2, **changes) -> ModelConfig:
    base = ModelConfig(
        model_type="test",
        vocab_size=64,
        hidden_size=48,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=8,
        intermediate_size=72,
        max_positions=128,
        norm_eps=1e-5,
        rope=Rope(dim=8),
        tied_head=True,
    )
    return replace(base, **changes)


def random_weights(config: ModelConfig, seed=0, salient=()) -> MemoryWeights:
    """`salient` channels of the residual stream are a hundred times as active as the others, as in large models."""
    generator = np.random.default_rng(seed)

    def noise(*shape, scale=0.15):
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    def linear(name, *rows, k):
        bias = noise(sum(rows)) if name in config.biases else None
        return Linear(tuple(noise(n, k) for n in rows), bias)

    def norm(size):
        values = 1 + noise(size)
        values[list(salient)] *= 30
        return values

    def layer():
        sizes = norm_sizes(config).items()
        norms = {name: noise(size) if name.endswith("_bias") else norm(size) for name, size in sizes if size != 8}
        norms |= {name: 1 + noise(size) for name, size in sizes if size == 8}
        ups = (config.intermediate_size,) * (2 if config.gated else 1)
        return Layer(
            **norms,
            qkv=linear("qkv", config.q_size, config.kv_size, config.kv_size, k=config.hidden_size),
            out=linear("out", config.hidden_size, k=config.q_size),
            up=linear("up", *ups, k=config.hidden_size),
            down=linear("down", config.hidden_size, k=config.intermediate_size),
        )

    return MemoryWeights(
        config, noise(config.vocab_size, config.hidden_size, scale=1.0), [layer() for _ in range(config.n_layers)],
        1 + noise(config.hidden_size),
    )  # fmt: skip


def sequences(config, lengths=(40, 7, 23), seed=1):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, config.vocab_size, n).tolist() for n in lengths]


def dense(weights, index=0):
    return dense_layer(weights.layer(index), lambda name, i, shape: (f"{name}[{i}]", None))


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(n_heads=4, n_kv_heads=4),
        tiny_config(biases=ALL),
        tiny_config(qk_norm=QKNorm.HEAD, biases=frozenset({"qkv"})),
        tiny_config(sliding_window=5, windowed_layers=frozenset({0})),
        tiny_config(n_heads=6, n_kv_heads=6, slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01), rope=Rope(dim=0), **PLAIN),
        tiny_config(n_heads=6, n_kv_heads=1, block=Block.PARALLEL_ONE_NORM, norm_bias=True, **PLAIN),
        tiny_config(block=Block.PARALLEL, norm_bias=True, biases=ALL, **PLAIN),
        tiny_config(block=Block.PARALLEL_ONE_NORM),
    ],
    ids=["gqa3", "gqa1", "biases", "qk_norm", "window", "mpt", "falcon-7b", "falcon-40b", "parallel, gated"],
)
def test_folding_changes_nothing(config):
    layer = dense(random_weights(config))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, config.hidden_size, generator=generator)
    context = Context.of_sequences(config, [17, 13])
    expected = block(config, DenseOps(), layer, 0, x, context)
    folded = layer
    for group in scaling_groups(config):
        channels = len(group.pooled(torch.ones(getattr(layer, group.consumers[0]).weight.shape[1])))
        scales = torch.exp(torch.randn(channels, generator=generator))
        folded = group.fold(folded, scales)
        for name in group.consumers:
            assert not torch.equal(getattr(folded, name).weight, getattr(layer, name).weight)
    found = block(config, DenseOps(), folded, 0, x, context)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_segment_of_q_k_and_v_folds_as_three():
    config = tiny_config(biases=ALL)
    layer = dense(random_weights(config))
    fused = replace(layer, qkv=replace(layer.qkv, rows=(len(layer.qkv.weight),), modules=("qkv",), kept=(None,)))
    group = scaling_groups(config)[1]
    scales = torch.exp(torch.randn(config.kv_size, generator=torch.Generator().manual_seed(0)))
    found, expected = group.fold(fused, scales).qkv, group.fold(layer, scales).qkv
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)


def test_nothing_is_folded_through_clipped_values():
    groups = {group.name for group in scaling_groups(tiny_config(clip_qkv=4.0))}
    assert groups == {"norm1 -> qkv", "out", "norm2 -> up", "up -> down"}


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"block": Block.NORM_AFTER}, {"qkv", "up"}),
        ({"norm_weight": False, "norm": Norm.LAYER}, {"qkv", "up"}),
        ({"block": Block.PARALLEL_ONE_NORM, "norm_weight": False, "norm": Norm.LAYER}, {"qkv, up"}),
        ({"clip_qkv": 100.0}, {"out"}),
        (PLAIN, {"down"}),
    ],
    ids=["stream", "no weight", "parallel", "clipped values", "no act_scale"],
)
def test_what_nothing_scales_is_clipped(changes, alone):
    """And the others, of whatever kind of block, scaled as they are wherever there is something to take the inverse."""
    config = tiny_config(**changes)
    source, grid = random_weights(config), Grid(3, 16)
    activations = Activations(config, source.embed(), sequences(config, (60, 60, 60, 60)), 100)
    layer = dense(source)
    made, results = awq.transform(config, layer, 0, activations.advance(layer, 0), grid, act_scales=False)
    assert {result.group for result in results if result.alpha is None} == {*alone, BLOCK}
    for result in results:
        if result.group in alone:
            assert result.clipped and result.loss < result.loss_rtn
            for name in result.group.split(", "):
                assert getattr(made, name).limits is not None and getattr(made, name).columns is None


@pytest.mark.parametrize("block_kind", Block)
def test_plain_mlps_and_parallel_blocks_are_quantized(block_kind):
    config = tiny_config(block=block_kind, norm_bias=True, **PLAIN)
    source = random_weights(config, salient=(3, 17))
    rounded, _ = quantize_in_memory(source, method="rtn", group_size=16)
    made, report = quantize_in_memory(source, group_size=16, sequences=sequences(config))
    for result in report.groups:
        assert result.loss <= result.loss_rtn or result.group == BLOCK
    names = {"norm1 -> qkv", "norm2 -> up"}
    if block_kind is Block.PARALLEL_ONE_NORM:
        names = {"norm1 -> qkv, up"}
    elif block_kind in (Block.NORM_AFTER, Block.POST_NORM):  # what reads the residual stream has no producer
        names = {"qkv", "up"}
    assert {result.group for result in report.groups} == names | {"v -> out", "act_scale -> down", BLOCK}
    rows = Rows.of(np.arange(30) * 7 % 64, 0, wanted="all")
    want, awq, rtn = (reference.build(w, ctx_size=30).step(rows) for w in (source, made, rounded))
    if names != {"qkv", "up"}:  # the salient channels are those of norms, where scales can be folded into them
        assert ((awq - want) ** 2).sum() < ((rtn - want) ** 2).sum()


def test_a_settled_norm_is_exact_in_fp16():
    """Where a scale is folded into a norm, what the file can hold decides, and the consumer makes up for it."""
    layer = dense(random_weights(tiny_config()))
    group = scaling_groups(tiny_config())[0]
    scales = group.settled(layer, torch.exp(torch.randn(48, generator=torch.Generator().manual_seed(0))))
    folded = group.fold(layer, scales)
    assert torch.allclose(folded.norm1, folded.norm1.half().float(), rtol=1e-6, atol=0)
    product = folded.qkv.weight * folded.norm1
    assert torch.allclose(product, layer.qkv.weight * layer.norm1, rtol=1e-5)


def test_kv_channels_share_a_scale_over_repeated_heads():
    group = scaling_groups(tiny_config(n_heads=6, n_kv_heads=2))[1]
    statistic = torch.arange(48.0)
    pooled = group.pooled(statistic)
    assert len(pooled) == 16
    assert pooled[0] == (0 + 8 + 16) / 3 and pooled[8] == (24 + 32 + 40) / 3
    spread = group.spread(pooled)
    assert torch.equal(spread[:8], spread[8:16]) and torch.equal(spread[24:32], spread[40:48])


@pytest.mark.parametrize("bits", [3, 4])
def test_no_group_is_worse_than_rounding(bits):
    config = tiny_config(biases=ALL)
    _, report = quantize_in_memory(
        random_weights(config, salient=(3, 17)), bits=bits, group_size=16, sequences=sequences(config)
    )
    groups = [result for result in report.groups if result.group != BLOCK]
    assert len(groups) == 4 * config.n_layers
    for result in groups:
        assert 0 < result.loss <= result.loss_rtn
        assert (result.alpha == 0 and not result.clipped) == (result.loss == result.loss_rtn)


def test_what_8_bits_lose_nothing_of_is_left_alone():
    """But not weights so small beside others of their group that they are lost, where their input is as large."""
    config = tiny_config()
    source = random_weights(config)
    given = {"bits": 8, "group_size": 16}
    rounded, _ = quantize_in_memory(source, method="rtn", **given)
    made, report = quantize_in_memory(source, sequences=sequences(config), **given)
    assert all(result.loss == result.loss_rtn for result in report.groups)
    for found, expected in zip(made.layers, rounded.layers, strict=True):
        assert np.array_equal(found.norm1, expected.norm1) and np.array_equal(found.norm2, expected.norm2)
        for name in LINEARS:
            pairs = zip(getattr(found, name).segments, getattr(expected, name).segments, strict=True)
            assert all(np.array_equal(a.codes, b.codes) and np.array_equal(a.scales, b.scales) for a, b in pairs)
    source.layers[0].norm2[[3, 17]] *= 100
    for part in source.layers[0].up.segments:
        part[:, [3, 17]] /= 100
    _, report = quantize_in_memory(source, sequences=sequences(config), **given)
    changed = {result.group for result in report.groups if result.layer == 0 and result.loss < 0.1 * result.loss_rtn}
    assert changed == {"norm2 -> up", BLOCK}


def test_scales_that_fp16_does_not_hold_are_not_tried():
    """Plain rounding has some that it does, and what is scaled up has not."""
    config = tiny_config()
    source = random_weights(config, salient=(3, 17))
    for part in source.layers[0].up.segments:
        part *= 1e5
    for method in ("awq", "awq+gptq"):
        _, report = quantize_in_memory(source, method=method, bits=2, group_size=16, sequences=sequences(config))
        found = {result.group.partition(",")[0]: result for result in report.groups if result.layer == 0}
        assert 0 <= found["norm2 -> up"].alpha < 1


def test_the_loss_reported_is_the_loss_of_what_is_written():
    """The search's figure for the attention inputs, computed again from the numbers that leave the quantizer."""
    config = tiny_config(n_layers=1)
    source = random_weights(config, salient=(3,))
    made, report = quantize_in_memory(source, bits=4, group_size=16, sequences=sequences(config))
    whole = next(result for result in report.groups if result.group == BLOCK)
    activations = Activations(config, source.embed(), sequences(config), 10**6)
    layer = dense(source)
    observed = activations.advance(layer, 0)
    written = made.layer(0)
    plain = Layer(
        norm1=written.norm1,
        norm2=written.norm2,
        **{n: Linear(tuple(s.dequantize() for s in getattr(written, n).segments)) for n in LINEARS},
    )
    rounded = dense_layer(plain, lambda n, i, s: (n, None))
    error = power = 0.0
    for sample in observed.held_out:
        expected = block(config, DenseOps(), layer, 0, sample.x, sample.context)
        found = block(config, DenseOps(), rounded, 0, sample.x, sample.context)
        error += float((found - expected).square().sum())
        power += float((expected - sample.x).square().sum())
    assert error / power == pytest.approx(whole.loss, rel=0.02)


def test_salient_channels_are_protected():
    """In layer 0; most of what layer 1 loses is what layer 0 has, which no scale brings back."""
    config = tiny_config()
    source = random_weights(config, salient=(3, 17))
    _, report = quantize_in_memory(source, bits=3, group_size=48, sequences=sequences(config, (64, 64)))
    for result in report.groups:
        if result.group in ("norm1 -> qkv", "norm2 -> up"):
            assert result.loss < (0.97 if result.layer else 0.5) * result.loss_rtn and result.alpha > 0


def test_alpha_one_and_identity_are_in_the_grid():
    magnitude = torch.tensor([0.01, 1.0, 4.0])
    assert torch.equal(awq.candidate(magnitude, 0.0), torch.ones(3))
    s = awq.candidate(magnitude, 1.0)
    assert torch.allclose(s / s[1], magnitude) and s.max() * s.min() == pytest.approx(1)


def test_dead_channels_are_left_alone():
    s = awq.candidate(torch.tensor([0.0, 1e-30, 2.0, 1e30]), 1.0)
    assert s[0] == 1 and torch.isfinite(s).all() and (s > 0).all()
    assert torch.equal(awq.candidate(torch.zeros(4), 0.5), torch.ones(4))
    config = tiny_config()
    source = random_weights(config)
    source.layers[0].norm1[5] = 0
    source.layers[0].up.segments[1][7] = 0
    made, _ = quantize_in_memory(source, bits=4, group_size=16, sequences=sequences(config))
    assert made.layer(0).norm1[5] == 0 and np.isfinite(made.layer(0).norm1).all()


def test_padding_is_not_needed_and_sequences_stay_apart():
    """Statistics of sequences together are the token-weighted mean of theirs alone."""
    config = tiny_config()
    source = random_weights(config)
    parts = sequences(config)

    def magnitude(chosen, name):
        return Activations(config, source.embed(), chosen, 100).advance(dense(source), 0).magnitude[name].double()

    for name in ("qkv", "out", "down"):
        apart = sum(magnitude([s], name) * len(s) for s in parts) / sum(map(len, parts))
        assert torch.allclose(magnitude(parts, name), apart, rtol=1e-5)


def test_activations_advance_as_the_blocks_do():
    config = tiny_config()
    source = random_weights(config)
    one = sequences(config, (33,))
    activations = Activations(config, source.embed(), one, 100)
    x = torch.from_numpy(source.embed()[one[0]])
    for index in range(config.n_layers):
        observed = activations.advance(dense(source, index), index)
        assert torch.allclose(observed.samples[0].x, x, atol=1e-5)
        x = block(config, DenseOps(), dense(source, index), index, x, Context.of_sequences(config, [33]))


def test_errors():
    config = tiny_config()
    with pytest.raises(UsageError, match="needs calibration"):
        quantize_in_memory(random_weights(config))
    with pytest.raises(UsageError, match=r"no method 'magic'; there are: awq, awq\+gptq, gptq, rtn"):
        quantize_in_memory(random_weights(config), method="magic")
    made, _ = quantize_in_memory(random_weights(config), method="rtn", group_size=16)
    with pytest.raises(UsageError, match="quantized already"):
        quantize_in_memory(made, method="rtn")
    broken = random_weights(config)
    broken.layers[1].down.segments[0][0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.down\[0\].*not finite"):
        quantize_in_memory(broken, method="rtn")
    broken.layers[0].norm1[0] = np.inf
    with pytest.raises(CheckpointError, match="layer 0 turns the calibration text"):
        quantize_in_memory(broken, sequences=sequences(config))


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_any_width_in_memory_with_a_short_last_group(bits):
    config = tiny_config()  # 72 inputs of `down`: groups of 32, 32 and 8
    made, report = quantize_in_memory(random_weights(config), method="rtn", bits=bits, group_size=32)
    down = made.layer(0).down.segments[0]
    assert down.bits == bits and down.scales.shape == (48, 3)
    assert report.bits_per_weight > bits
    exact, rounded = random_weights(config).layer(0).down.segments[0].astype(np.float64), down.dequantize(np.float64)
    assert report.rounding["down"][0] == pytest.approx(((rounded - exact) ** 2).sum() / (exact**2).sum(), rel=1e-4)
    assert Grid(bits, -1).width(72) == 72
