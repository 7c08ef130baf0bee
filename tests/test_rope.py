"""Rotary angles against transformers', under every scaling and at long positions, and against float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tinychat import architectures, rope
from tinychat.config import Rope, RopeScaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn, original from max_position_embeddings": {"rope_type": "yarn", "factor": 8.0},
    "yarn, factor from the contexts": {**YARN, "factor": None},
    "yarn, mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, only one mscale": {**YARN, "mscale": 0.7},
    "yarn, attention_factor": {**YARN, "attention_factor": 1.25},
    "yarn, exact range": {**YARN, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0},
    "yarn, null betas": {**YARN, "beta_fast": None, "beta_slow": None},
    "yarn, empty range": {**YARN, "original_max_position_embeddings": 6},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 2048},
    "llama3, original from max_position_embeddings": LLAMA3,
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 4.0},
    "longrope, attention_factor": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.3,
    },
}
POSITIONS = np.array([0, 1, 2, 63, 4095, 16383, 16384, 32767, 100_003, 131_071], np.int32)


def both(parameters: dict, head_dim: int, theta: float) -> tuple[LlamaRotaryEmbedding, Rope]:
    """transformers' module and our description of the same config."""
    if parameters["rope_type"] == "longrope":
        each = np.linspace(0, 1, head_dim // 2)
        parameters = {**parameters, "short_factor": (1 + each).tolist(), "long_factor": (1 + 30 * each**2).tolist()}
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=16384,
        rope_parameters={**parameters, "rope_theta": theta},
    )
    return LlamaRotaryEmbedding(config), architectures.translate(config.to_dict())[0].rope


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_angles_equal_transformers(name, theta, head_dim):
    theirs, ours = both(SCALINGS[name], head_dim, theta)
    length = int(POSITIONS[-1]) + 1
    with torch.no_grad():
        cos, sin = theirs(torch.zeros(1), torch.from_numpy(POSITIONS)[None].long())
    want_cos, want_sin = (t[0, :, : head_dim // 2].numpy() for t in (cos, sin))
    got_cos, got_sin = rope.angles(ours, POSITIONS, np.full(len(POSITIONS), length))
    frequencies, scale = rope.inv_freq(ours, length)
    assert scale == pytest.approx(theirs.attention_scaling)
    # powers and logarithms differ in the last bit between libraries: 4 bits of a frequency, times the position
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=5e-7)
    tolerance = POSITIONS[:, None] * frequencies * 5e-7 * scale + 1e-6
    assert np.all(np.abs(got_cos - want_cos) <= tolerance)
    assert np.all(np.abs(got_sin - want_sin) <= tolerance)
    assert got_cos.dtype == got_sin.dtype == np.float32


def test_every_scaling_is_covered():
    assert {both(p, 64, 1e4)[1].scaling for p in SCALINGS.values()} == set(RopeScaling)


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_differ_from_the_default(name):
    plain = Rope(10000.0, 64)
    ours = both(SCALINGS[name], 64, 10000.0)[1]
    differs = not np.allclose(rope.inv_freq(ours, 100_000)[0], rope.inv_freq(plain, 100_000)[0], rtol=1e-3)
    assert differs == (name != "default")


def test_default_is_the_formula():
    frequencies, scale = rope.inv_freq(Rope(10000.0, 80), 1)
    exact = np.array([10000.0 ** (-2 * j / 80) for j in range(40)])
    np.testing.assert_allclose(frequencies, exact, rtol=5e-7)
    assert scale == 1.0
    cos, sin = rope.angles(Rope(10000.0, 80), np.array([3], np.int32), np.array([4]))
    np.testing.assert_allclose(cos[0], np.cos(3 * exact), atol=1e-6)
    np.testing.assert_allclose(sin[0], np.sin(3 * exact), atol=1e-6)


def test_dynamic_is_plain_within_its_context_and_follows_each_length_beyond():
    dynamic = Rope(10000.0, 64, RopeScaling.DYNAMIC, 2.0, 100)
    plain = rope.inv_freq(Rope(10000.0, 64), 1)[0]
    for length in (1, 99, 100):
        np.testing.assert_array_equal(rope.inv_freq(dynamic, length)[0], plain)
    # two slots in one step: each row has the angles of its own slot's length
    positions, lengths = np.array([50, 150, 250], np.int32), np.array([90, 151, 300])
    cos, _ = rope.angles(dynamic, positions, lengths)
    for row, (position, length) in enumerate(zip(positions, lengths, strict=True)):
        np.testing.assert_array_equal(cos[row], rope.angles(dynamic, np.array([position]), np.array([length]))[0][0])
    base = 10000.0 * (2 * 300 / 100 - 1) ** (64 / 62)
    np.testing.assert_allclose(rope.inv_freq(dynamic, 300)[0], base ** -(np.arange(32) / 32), rtol=1e-6)


def test_yarn_temperature():
    yarn = Rope(10000.0, 64, RopeScaling.YARN, 4.0, 1024)
    assert rope.inv_freq(yarn, 1)[1] == pytest.approx(0.1 * math.log(4) + 1)
    cos, _ = rope.angles(yarn, np.array([0]), np.array([1]))
    np.testing.assert_allclose(cos, 0.1 * math.log(4) + 1, rtol=1e-6)
    assert rope.inv_freq(dataclasses.replace(yarn, factor=1.0), 1)[1] == 1.0


def test_no_rows():
    cos, sin = rope.angles(Rope(10000.0, 64), np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert cos.shape == sin.shape == (0, 32)


def test_shared_frequencies_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        rope.inv_freq(Rope(10000.0, 64), 1)[0][0] = 2


@pytest.mark.parametrize("scaling", [RopeScaling.NONE, RopeScaling.DYNAMIC])
def test_a_table_has_the_angles_of_every_row(scaling):
    config = Rope(dim=16, scaling=scaling, factor=4.0, original_max_positions=40)
    table = rope.Table(config, 1000)
    for positions, lengths in [([0], [1]), ([5, 6, 7], [8, 8, 8]), ([39], [40]), ([3, 700], [4, 701]), ([600], [601])]:
        at, length = np.array(positions, np.int32), np.array(lengths, np.int32)
        for found, expected in zip(table.rows(at, length), rope.angles(config, at, length), strict=True):
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-6)
    assert table.rows(np.zeros(0, np.int32), np.zeros(0, np.int32))[0].shape == (0, 8)
