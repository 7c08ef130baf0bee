"""The AWQ layout: worked examples, every word against a loop written from the description, exact inverses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import pack_words

from tinychat.checkpoint import awq, layouts
from tinychat.checkpoint.awq import AwqFormat
from tinychat.errors import ConfigError
from tinychat.qtensor import AWQ_ORDER, AwqWords, QTensor, bfloat16


def random_qtensor(n, k, group_size, seed=0, dtype=np.float16):
    rng = np.random.default_rng(seed)
    return QTensor(
        codes=rng.integers(0, 16, (n, k), np.uint8),
        scales=rng.standard_normal((n, k // group_size)).astype(np.float16).astype(dtype),
        zeros=rng.integers(0, 16, (n, k // group_size), np.uint8),
        bits=4,
        group_size=group_size,
    )


def same(a, b):
    return (
        np.array_equal(a.codes, b.codes)
        and np.array_equal(a.zeros, b.zeros)
        and np.array_equal(a.scales, b.scales)
        and (a.scales.dtype, a.bits, a.group_size) == (b.scales.dtype, b.bits, b.group_size)
    )


def test_worked_example():
    codes = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [15, 1, 8, 3, 0, 7, 12, 5]], np.uint8).T.copy()  # [N=8, K=2]
    zeros = np.array([[8, 8, 8, 8, 7, 7, 7, 7]], np.uint8).T.copy()
    packed = awq.pack(QTensor(codes, np.ones((8, 1), np.float16), zeros, 4, 2))
    assert packed["qweight"].tolist() == [[0x75316420], [0x5731C08F]]
    assert packed["qzeros"].tolist() == [[0x77887788]]
    assert packed["qweight"].dtype == np.int32 and packed["scales"].shape == (1, 8)


def test_dequantized_value_follows_the_formula():
    q = random_qtensor(16, 64, 32, seed=3)
    packed = awq.pack(q)
    n, k, group = 11, 40, 1
    nibble = AWQ_ORDER.index(n % 8)
    code = int(packed["qweight"].view(np.uint32)[k, n // 8]) >> 4 * nibble & 15
    zero = int(packed["qzeros"].view(np.uint32)[group, n // 8]) >> 4 * nibble & 15
    assert (code - zero) * float(packed["scales"][group, n]) == pytest.approx(float(q.dequantize()[n, k]))


@settings(max_examples=40, deadline=None)
@given(words=st.integers(1, 40), groups=st.integers(1, 5), group_size=st.integers(1, 70), seed=st.integers(0, 99))
def test_pack_and_unpack_are_inverses(words, groups, group_size, seed):
    q = random_qtensor(8 * words, groups * group_size, group_size, seed)
    packed = awq.pack(q)
    assert np.array_equal(packed["qweight"], pack_words(q.codes.T))
    assert np.array_equal(packed["qzeros"], pack_words(q.zeros.T))
    again = AwqWords(**packed).tensor()
    assert same(again, q)
    assert all(np.array_equal(awq.pack(again)[part], packed[part]) for part in awq.ENDINGS)
    assert again.codes.flags.c_contiguous and again.scales.flags.c_contiguous


def test_larger_than_a_tile():
    q = random_qtensor(8 * 19, 2200, 1100)
    assert same(AwqWords(**awq.pack(q)).tensor(), q)


def test_unpack_reads_strided_and_read_only_arrays():
    q = random_qtensor(24, 64, 32)
    packed = {name: np.asfortranarray(array) for name, array in awq.pack(q).items()}
    for array in packed.values():
        array.flags.writeable = False
    assert same(AwqWords(**packed).tensor(), q)


def test_unpack_keeps_bfloat16_scales():
    q = random_qtensor(8, 32, 32)
    packed = awq.pack(q)
    assert AwqWords(**{**packed, "scales": packed["scales"].astype(bfloat16)}).tensor().scales.dtype == bfloat16


def test_shapes_must_agree():
    packed = awq.pack(random_qtensor(16, 64, 32))
    for change in (
        {"qweight": packed["qweight"][:63]},
        {"qzeros": packed["qzeros"][:, :1]},
        {"qzeros": packed["qzeros"][:1]},
        {"scales": packed["scales"][:, :8]},
        {"scales": packed["scales"][:0]},
    ):
        with pytest.raises(ValueError, match="do not agree"):
            AwqWords(**{**packed, **change})


def test_pack_refuses_what_the_layout_cannot_hold():
    with pytest.raises(ValueError, match="12 outputs"):
        awq.pack(random_qtensor(12, 64, 32))
    q = random_qtensor(16, 64, 32)
    with pytest.raises(ValueError, match="3 bits"):
        awq.pack(QTensor(q.codes, q.scales, q.zeros, 3, 32))
    with pytest.raises(ValueError, match="fp16 scales"):
        awq.pack(QTensor(q.codes, q.scales.astype(np.float32) * np.float32(1 + 2**-20), q.zeros, 4, 32))
    ragged = QTensor(q.codes, np.ones((16, 2), np.float16), np.ones((16, 2), np.uint8), 4, 48)
    with pytest.raises(ValueError, match="not a multiple of the group size 48"):
        awq.pack(ragged)


def test_pack_takes_wider_scales_that_fp16_holds():
    q = random_qtensor(16, 64, 32, dtype=np.float32)
    assert awq.pack(q)["scales"].dtype == np.float16


def test_fits():
    assert awq.fits((64, 256), 128) is None
    assert awq.fits((64, 172), -1) is None
    assert "172 inputs" in awq.fits((64, 172), 128)
    assert "172 outputs" in awq.fits((172, 64), 32)


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM", "modules_to_not_convert": None},
        {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"},
        {"quant_method": "awq", "group_size": 64, "do_fuse": False, "exllama_config": None, "backend": "autoawq"},
        {"quant_method": "awq", "bits": 4, "group_size": 64, "format": "gemm", "backend": "auto", "desc_act": False},
    ],
)
def test_spellings_of_the_config(raw):
    assert layouts.parse(raw, "here") == AwqFormat(bits=4, group_size=64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_method": "bitsandbytes"}, "quant_method bitsandbytes; supported are awq, "),
        ({"quant_method": None}, "quant_method None"),
        ({"version": "gemv"}, "version gemv; supported is 'gemm'"),
        ({"version": "gemv_fast"}, "gemv_fast"),
        ({"version": "marlin"}, "marlin"),
        ({"version": 3}, "version 3"),
        ({"backend": "llm-awq"}, "llm-awq"),
        ({"bits": 3}, "3 bits"),
        ({"bits": True}, "True bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "128"}, "group_size 128"),
        ({"zero_point": "yes"}, "zero_point yes"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert lm_head"),
        ({"modules_to_not_convert": [1]}, "list of names"),
        ({"version": "\x1b[31m"}, r"\\x1b"),
    ],
)
def test_configs_refused(change, message):
    raw = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", **change}
    with pytest.raises(ConfigError, match=message) as fault:
        layouts.parse(raw, "config.json")
    assert str(fault.value).startswith("config.json") and "\x1b" not in str(fault.value)


def test_written_config_is_read_back():
    made = AwqFormat(group_size=-1, modules_to_not_convert=("lm_head", "model.layers.1.mlp.down_proj"))
    assert AwqFormat.parse(made.to_config(), "here") == made
    assert AwqFormat().to_config()["modules_to_not_convert"] is None


def test_excludes_by_whole_parts_of_the_name():
    exceptions = AwqFormat(modules_to_not_convert=("mlp.gate", "model.layers.1", "lm_head"))
    assert exceptions.excludes("model.layers.0.mlp.gate") and exceptions.excludes("model.layers.1.mlp.up_proj")
    assert exceptions.excludes("lm_head")
    assert not exceptions.excludes("model.layers.0.mlp.gate_proj")
    assert not exceptions.excludes("model.layers.11.mlp.up_proj")
