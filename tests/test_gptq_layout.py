"""The GPTQ layout: every bit against a loop written from the description, exact inverses, v1 zeros, act-order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinychat.checkpoint import gptq, layouts
from tinychat.checkpoint.bitstream import codes_per_unit, pack_bits, unpack_bits
from tinychat.checkpoint.gptq import GptqFormat
from tinychat.errors import ConfigError
from tinychat.qtensor import QTensor


def random_qtensor(n, k, group_size, bits, seed=0, permuted=False):
    rng = np.random.default_rng(seed)
    groups = -(-k // group_size)
    return QTensor(
        codes=rng.integers(0, 2**bits, (n, k), np.uint8),
        scales=rng.standard_normal((n, groups)).astype(np.float16),
        zeros=rng.integers(0, 2**bits, (n, groups), np.uint8),
        bits=bits,
        group_size=group_size,
        permutation=rng.permutation(k).astype(np.int32) if permuted else None,
    )


def same(a, b):
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros")]
    ordered = (a.permutation is None) == (b.permutation is None)
    return (
        all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)
        and (a.bits, a.group_size) == (b.bits, b.group_size)
        and (ordered and (a.permutation is None or np.array_equal(a.permutation, b.permutation)))
    )


def bits_of(words, bits, i):
    """Code i of a row of words, bit after bit."""
    value = 0
    for j in range(bits):
        at = i * bits + j
        value |= (int(words.view(np.uint32)[at // 32]) >> at % 32 & 1) << j
    return value


def dequantized(parts, bits, zeros_less_one=False):
    """w[n, k], as the format's description has it, one number at a time."""
    (k,), n = parts["g_idx"].shape, parts["scales"].shape[1]
    weight = np.empty((n, k))
    for i in range(k):
        group = parts["g_idx"][i]
        for row in range(n):
            zero = bits_of(parts["qzeros"][group], bits, row) + zeros_less_one
            code = bits_of(np.ascontiguousarray(parts["qweight"][:, row]), bits, i)
            weight[row, i] = (code - zero) * float(parts["scales"][group, row])
    return weight


def test_three_bits_cross_words_as_the_format_says():
    codes = np.arange(32, dtype=np.uint8)[None] % 8
    words = pack_bits(codes, 3).view(np.uint32)[0]
    assert words[0] == sum((i % 8) << 3 * i for i in range(10)) | (10 % 8 & 3) << 30
    assert words[1] == 10 % 8 >> 2 | sum((i % 8) << 3 * (i - 11) + 1 for i in range(11, 21)) | (21 % 8 & 1) << 31
    assert words[2] == 21 % 8 >> 1 | sum((i % 8) << 3 * (i - 22) + 2 for i in range(22, 32))


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from(gptq.BITS), rows=st.integers(1, 150), units=st.integers(1, 5), seed=st.integers(0, 99))
def test_bitstream(bits, rows, units, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, units * codes_per_unit(bits)), np.uint8)
    words = pack_bits(codes, bits)
    assert words.dtype == np.int32 and words.nbytes * 8 == codes.size * bits
    assert [bits_of(words[-1], bits, i) for i in range(codes.shape[1])] == codes[-1].tolist()
    assert np.array_equal(unpack_bits(words, bits), codes)
    assert np.array_equal(unpack_bits(np.asfortranarray(words), bits), codes)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group_size", [32, 48, 96, -1])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_pack_and_read(bits, group_size, permuted):
    q = random_qtensor(64, 96, 96 if group_size == -1 else group_size, bits, permuted=permuted)
    layout = GptqFormat(bits, group_size, act_order=permuted)
    parts = layout.pack(q)
    for ending, part in layout.parts(q.shape).items():
        assert parts[ending].shape == part.shape and parts[ending].dtype == (
            np.float16 if ending == "scales" else np.int32
        )
    np.testing.assert_allclose(dequantized(parts, bits), q.dequantize(np.float64), rtol=1e-12)
    again = layout.read(q.shape, parts).tensor()
    assert np.array_equal(again.dequantize(), q.dequantize())
    assert all(np.array_equal(array, parts[ending]) for ending, array in layout.pack(again).items())
    if not permuted:
        assert same(again, q)
        assert same(layout.read(q.shape, {k: v for k, v in parts.items() if k != "g_idx"}).tensor(), q)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_zeros_less_one(bits):
    q = random_qtensor(32, 32, 16, bits)
    q.zeros[q.zeros == 0] = 1
    parts = GptqFormat(bits, 16).pack(q)
    stored = {**parts, "qzeros": pack_bits(q.zeros.T - np.uint8(1), bits)}
    np.testing.assert_allclose(dequantized(stored, bits, True), q.dequantize(np.float64), rtol=1e-12)
    for borrows in (False, True):
        assert same(GptqFormat(bits, 16, zeros_less_one=True, borrows=borrows).read(q.shape, stored).tensor(), q)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_a_zero_of_zero_less_one(bits):
    """Engines disagree about it, unless it is known that whole words were reduced (3 bits: code after code)."""
    q = random_qtensor(32, 32, 16, bits)
    q.zeros[:3] = 0
    words = pack_bits(q.zeros.T, bits).view(np.uint32)
    less = words - np.uint32(sum(1 << i for i in range(0, 32, bits)))
    if bits == 3:
        less = pack_bits((q.zeros.T - np.uint8(1)) & np.uint8(7), 3)
    stored = {**GptqFormat(bits, 16).pack(q), "qzeros": less.view(np.int32)}
    with pytest.raises(ValueError, match=f"a zero stored as {2**bits - 1}, of which one engine makes 0"):
        GptqFormat(bits, 16, zeros_less_one=True).read(q.shape, stored)
    assert same(GptqFormat(bits, 16, zeros_less_one=True, borrows=True).read(q.shape, stored).tensor(), q)


def test_g_idx_that_makes_no_groups():
    layout, q = GptqFormat(2, 16), random_qtensor(16, 64, 16, 2)
    parts = layout.pack(q)
    for change in ((0, 1), (0, 4), (5, -1)):
        group_of = parts["g_idx"].copy()
        group_of[change[0]] = change[1]
        with pytest.raises(ValueError, match="does not make groups of 16 inputs each"):
            layout.read(q.shape, {**parts, "g_idx": group_of})


def test_pack_refuses_what_the_layout_cannot_hold():
    q = random_qtensor(32, 64, 32, 3)
    for layout, message in (
        (GptqFormat(2, 32), "3 bits in groups of 32, not 2"),
        (GptqFormat(3, 64), "in groups of 32, not 3 in 64"),
        (GptqFormat(3, 32, symmetric=True), "not symmetric: not every zero is 4"),
        (GptqFormat(3, 32, zeros_less_one=True), "gptq_v2"),
    ):
        with pytest.raises(ValueError, match=message):
            layout.pack(q)
    with pytest.raises(ValueError, match="40 inputs are not a multiple of 32"):
        GptqFormat(3, 40).pack(random_qtensor(32, 40, 40, 3))
    with pytest.raises(ValueError, match="an order of their own"):
        GptqFormat(3, 32).pack(random_qtensor(32, 64, 32, 3, permuted=True))
    wide = QTensor(q.codes, q.scales.astype(np.float32) * np.float32(1 + 2**-20), q.zeros, 3, 32)
    with pytest.raises(ValueError, match="fp16 scales"):
        GptqFormat(3, 32).pack(wide)


def test_misfit():
    assert GptqFormat(3, 128).misfit((64, 160)) is None
    assert "24 outputs are not a multiple of 16" in GptqFormat(2, 8).misfit((24, 64))
    assert "66 inputs are not a multiple of 4" in GptqFormat(8, 33).misfit((64, 66))


RAW = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {"zeros_less_one": True}),
        ({"checkpoint_format": "gptq"}, {"zeros_less_one": True}),
        ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, {}),
        ({"quant_method": None, "desc_act": True}, {"zeros_less_one": True, "act_order": True}),
        ({"sym": False}, {"zeros_less_one": True, "symmetric": False}),
        ({"meta": {"quantizer": ["gptqmodel:7.6.0"]}}, {"zeros_less_one": True, "borrows": True}),
        ({"meta": {"quantizer": "optimum:1.0"}, "dataset": "c4"}, {"zeros_less_one": True}),
        ({"format": "gptq_v2", "dynamic": {"-:lm_head": {}}, "group_size": -1}, {"group_size": -1}),
    ],
)
def test_spellings_of_the_config(change, expected):
    raw = {key: value for key, value in {**RAW, **change}.items() if value is not None}
    assert layouts.parse(raw, "here") == GptqFormat(**{"symmetric": True, **expected})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, "bits 5; GPTQ checkpoints of 2, 3, 4, 8 bits"),
        ({"bits": "4"}, "bits 4; GPTQ"),
        ({"group_size": 0}, "group_size 0"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin; supported are 'gptq' and 'gptq_v2'"),
        ({"format": "bitblas"}, "format bitblas"),
        ({"is_marlin_format": True}, "is_marlin_format True"),
        ({"pack_dtype": "int16"}, "pack_dtype int16"),
        ({"rotation": "hadamard"}, "rotation hadamard; it is not implemented"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic .*; supported are patterns of modules that are left out"),
        ({"sym": 1}, "sym 1; expected is true or false"),
    ],
)
def test_configs_refused(change, message):
    with pytest.raises(ConfigError, match=message) as fault:
        layouts.parse({**RAW, **change}, "config.json")
    assert str(fault.value).startswith("config.json says")


def test_written_config_is_read_back():
    made = GptqFormat(3, 64, False, True)
    written = made.excluding(["model.layers.1.mlp.up_proj"], ["mlp.down_proj"]).to_config()
    assert written["modules_in_block_to_quantize"] == [["mlp.down_proj"]] and layouts.parse(written, "here") == made
    assert made.excluding(["lm_head"]).to_config()["dynamic"] == {"-:^lm_head$": {}}
    assert made.excluding(["lm_head"]).excludes("lm_head") and not made.excludes("lm_head")


def test_the_layout_for_writing():
    assert layouts.for_writing(4, 128).method == "awq" and layouts.for_writing(4, 128, symmetric=True).method == "awq"
    free = layouts.for_writing(4, 128, act_order=True)
    assert (free.method, free.bits, free.group_size, free.act_order) == ("gptq", 4, 128, True)
    for bits in (2, 3, 8):
        assert (found := layouts.for_writing(bits, 64)).method == "gptq" and found.bits == bits
        assert found.to_config()["checkpoint_format"] == "gptq_v2"
