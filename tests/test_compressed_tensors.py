"""The layout of compressed-tensors: words that its own library packed, a loop from the description, what is refused."""

import numpy as np
import pytest
import tiny_checkpoints as tiny

from tinychat import checkpoint
from tinychat.backends import cpu, reference
from tinychat.cache import Rows
from tinychat.checkpoint import layouts
from tinychat.checkpoint.bitstream import unpack_bits
from tinychat.checkpoint.compressed_tensors import PackQuantized
from tinychat.errors import CheckpointError, ConfigError, UsageError

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32, "dynamic": False}
RAW = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}},
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
}


def integers(n, k, groups, bits):
    """Codes [n, k] and zeros [n, groups] that the vectors below were packed from, with their sign."""
    top, half = 2**bits, 2 ** (bits - 1)
    codes = (np.arange(n * k).reshape(n, k) * 5 + np.arange(n)[:, None] * 3) % top - half
    return codes, (np.arange(n * groups).reshape(n, groups) * 7) % top - half


# Made by compressed-tensors 0.20.0, PackedQuantizationCompressor.compress, from `integers` with scales i / 64.
FOUR_BITS = (
    [
        [1049950800, -1239649576],
        [1640443267, -380656373],
        [-1795534666, 477288510],
        [-953318423, 1336216417],
        [-95373796, 1926774420],
        [763619663, -1525980729],
        [1354112114, -666987270],
        [-2081861723, 190957357],
    ],
    [[610839776, -1679879337]],
)
THREE_BITS = (  # of 16 outputs, the first row; its zeros' first row
    [-1468477784, -827819826, 2026809464, 7917224],
    [-1733573736, 1468477783, 241348366, -983687995, -1137079620],
)


def test_four_bits_as_the_library_packs_them():
    codes, zeros = integers(8, 16, 2, 4)
    packed, zero_points = (np.array(words, np.int32) for words in FOUR_BITS)
    scales = (np.arange(16).reshape(8, 2).astype(np.float32) + 1) / 64
    layout = PackQuantized(4, 8, False)
    parts = {"weight_packed": packed, "weight_scale": scales, "weight_zero_point": zero_points}
    assert {name: part.shape for name, part in layout.parts((8, 16)).items() if name in parts} == {
        name: array.shape for name, array in parts.items()
    }
    q = layout.read((8, 16), {**parts, "weight_shape": np.array([8, 16])}).tensor()
    assert np.array_equal(q.codes, codes + 8) and np.array_equal(q.zeros, zeros + 8)
    np.testing.assert_array_equal(q.dequantize(), (codes - zeros.repeat(8, 1)) * scales.repeat(8, 1))
    symmetric = PackQuantized(4, 8, True).read((8, 16), parts).tensor()
    np.testing.assert_array_equal(symmetric.dequantize(), codes * scales.repeat(8, 1))


def test_three_bits_as_the_library_packs_them():
    codes, zeros = integers(16, 40, 5, 3)
    layout = PackQuantized(3, 8, False)
    assert layout.parts((16, 40))["weight_packed"].shape == (16, 4)
    assert layout.parts((16, 40))["weight_zero_point"].shape == (2, 5)
    row, zero_row = (np.array([words], np.int32) for words in THREE_BITS)
    assert np.array_equal(unpack_bits(row, 3, 40)[0], codes[0] + 4)
    assert np.array_equal(unpack_bits(zero_row.T, 3, 10), (zeros[:10] + 4).T)


def pack(values, bits):
    """[R, C] -> int32 [R, ceil(C * bits / 32)], bit after bit."""
    words = np.zeros((values.shape[0], -(-values.shape[1] * bits // 32)), np.uint32)
    for row, column, bit in np.ndindex(*values.shape, bits):
        at = column * bits + bit
        words[row, at // 32] |= np.uint32((int(values[row, column]) >> bit & 1) << at % 32)
    return words.view(np.int32)


def quantized(bits, symmetric, group_size):
    """(tensors of a checkpoint of tiny.CONFIG, the same with what they stand for)."""
    rng = np.random.default_rng(0)
    tensors = tiny.plain()
    plain = dict(tensors)
    for module in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
        n, k = tensors.pop(f"{module}.weight").shape
        group = k if group_size == -1 else group_size
        q, z = rng.integers(0, 2**bits, (n, k)), rng.integers(0, 2**bits, (n, k // group))
        z = np.full_like(z, 2 ** (bits - 1)) if symmetric else z
        s = (rng.random((n, k // group)) / 2**bits + 0.01).astype(np.float16)
        plain[f"{module}.weight"] = ((q - z.repeat(group, 1)) * s.repeat(group, 1).astype(np.float32)).astype(
            np.float32
        )
        tensors |= {f"{module}.weight_packed": pack(q, bits), f"{module}.weight_scale": s}
        tensors[f"{module}.weight_shape"] = np.array([n, k], np.int64)
        if not symmetric:
            tensors[f"{module}.weight_zero_point"] = np.ascontiguousarray(pack(z.T, bits).T)
    return tensors, plain


def config(**changes):
    return {**RAW, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, **changes}}}}


@pytest.mark.parametrize(
    "bits, symmetric, group_size, scales",
    [(4, False, 32, "f2"), (4, True, 16, "f4"), (8, False, -1, "f2"), (3, False, 32, "f4"), (2, True, 32, "f2")],
)
def test_a_checkpoint(tmp_path, bits, symmetric, group_size, scales):
    tensors, plain = quantized(bits, symmetric, group_size)
    tensors = {name: t.astype(scales) if name.endswith("weight_scale") else t for name, t in tensors.items()}
    strategy = {"strategy": "channel", "group_size": None} if group_size == -1 else {"group_size": group_size}
    raw = config(num_bits=bits, symmetric=symmetric, **strategy)
    found = checkpoint.open(tiny.write(tmp_path / "packed", tensors, quantization_config=raw))
    meant = checkpoint.open(tiny.write(tmp_path / "plain", plain))
    assert found.n_parameters == meant.n_parameters and found.n_quantized == 61440
    for index in range(2):
        for linear in ("qkv", "out", "up", "down"):
            pairs = zip(*(getattr(c.layer(index), linear).segments for c in (found, meant)), strict=True)
            assert all(np.array_equal(a.tensor().dequantize(), b) for a, b in pairs)
    rows = Rows.of([1, 5, 9, 30], 0, wanted="all")
    logits = [reference.build(c, ctx_size=8).step(rows) for c in (found, meant)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-4 * np.abs(logits[1]).max())
    if cpu.available() is None:
        packed = cpu.build(found, ctx_size=8).step(rows)
        assert ((packed - logits[1]) ** 2).sum() < 1e-6 * (logits[1] ** 2).sum()


def test_what_is_wrong_is_named(tmp_path):
    tensors, _ = quantized(4, False, 32)
    for i, (ending, array, message) in enumerate(
        [
            ("weight_zero_point", None, "q_proj.weight_zero_point is missing"),
            ("weight_packed", np.zeros((64, 9), np.int32), r"has shape \[64, 9\]; expected is \[64, 8\]"),
            ("weight_g_idx", np.zeros(64, np.int32), "tensors that this model does not have: .*weight_g_idx"),
        ]
    ):
        changed = {**tensors, f"{tiny.Q_PROJ}.{ending}": array}
        changed = {name: value for name, value in changed.items() if value is not None}
        with pytest.raises(CheckpointError, match=message):
            checkpoint.open(tiny.write(tmp_path / str(i), changed, quantization_config=RAW))
    wrong = {**tensors, f"{tiny.Q_PROJ}.weight_shape": np.array([64, 63])}
    with pytest.raises(CheckpointError, match=r"its weight_shape says \[64, 63\]; expected is \[64, 64\]"):
        checkpoint.open(tiny.write(tmp_path / "shape", wrong, quantization_config=RAW)).layer(0)
    with pytest.raises(CheckpointError, match="says COMPRESSED-TENSORS, but no linear has a weight_packed"):
        checkpoint.open(tiny.write(tmp_path / "plain", tiny.plain(), quantization_config=RAW))


@pytest.mark.parametrize(
    "raw, message",
    [
        (
            {**RAW, "format": "float-quantized"},
            "format of group_0 float-quantized; of compressed-tensors 'pack-quantized'",
        ),
        ({**RAW, "config_groups": {}}, "no config_groups"),
        (config(num_bits=5), "num_bits 5; supported are 2, 3, 4, 8"),
        (config(type="float"), "type float"),
        (config(strategy="tensor"), "strategy tensor"),
        (config(group_size=None), "group_size None"),
        (config(actorder="group"), "actorder group"),
        (config(dynamic=True), "dynamic True"),
        ({**RAW, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme .*; it is not implemented"),
        ({**RAW, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config .*; sparse weights"),
        ({**RAW, "ignore": "lm_head"}, "ignore lm_head; expected is a list"),
    ],
)
def test_configs_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        layouts.parse(raw, "here")


def test_activations_that_are_quantized_are_refused():
    group = {"weights": WEIGHTS, "input_activations": {"num_bits": 8}}
    with pytest.raises(ConfigError, match=r"input_activations of group_0 .*; quantized activations"):
        layouts.parse({**RAW, "config_groups": {"group_0": group}}, "here")
    two = {"a": {"weights": WEIGHTS}, "b": {"weights": {**WEIGHTS, "num_bits": 8}}}
    with pytest.raises(ConfigError, match="one kind of weights is supported"):
        layouts.parse({**RAW, "config_groups": two}, "here")


def test_it_is_not_written():
    assert layouts.for_writing(8, 128).method == "gptq"
    with pytest.raises(UsageError, match="5 bits cannot be written"):
        layouts.for_writing(5, 128)
