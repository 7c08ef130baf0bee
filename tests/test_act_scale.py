"""AWQ's act_scale in files: under the names that AutoAWQ gives it, optional for each layer, checked, divided by."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_architectures import ours, tokens
from tiny_models import tiny

from tinychat import checkpoint, quantize
from tinychat.architectures.names import TensorNames
from tinychat.backends import cpu, reference
from tinychat.errors import CheckpointError

FAMILIES = {
    "mpt": ("transformer.blocks.{}.ffn.act.scales", {"d_model": 64, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("transformer.h.{}.mlp.act.scales", {"hidden_size": 64, "ffn_hidden_size": 128}),
}


def saved(directory, family, scales, **changes):
    """A checkpoint whose `down` has its columns multiplied by the scales of its layer; the scales beside it."""
    name, sizes = FAMILIES[family]
    model, config = tiny(family, num_attention_heads=4, **{**sizes, **changes})
    state = {k: v.numpy().copy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for layer, scale in scales.items():
        (down,) = (k for k in state if f".{layer}." in k and ("down_proj.weight" in k or "4h_to_h.weight" in k))
        state[down] *= scale.astype(np.float32)
        state[name.format(layer)] = scale
    directory.mkdir()
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return checkpoint.open(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_equal_model(tmp_path, family, dtype):
    plain = saved(tmp_path / "plain", family, {})
    size = plain.config.intermediate_size
    scale = np.random.default_rng(0).uniform(0.25, 4, size).astype(dtype)
    scaled = saved(tmp_path / "scaled", family, {1: scale})
    assert scaled.layer(0).act_scale is None and np.array_equal(scaled.layer(1).act_scale, scale.astype(np.float32))
    assert scaled.n_parameters == plain.n_parameters
    ids = tokens(20)
    for backend in (reference, cpu):
        if backend.available() is None:
            expected, found = (ours(source, ids, [17, 3], backend) for source in (plain, scaled))
            assert np.abs(found - expected).max() < 1e-4
    quantize.quantize(scaled.path, tmp_path / "out", method="rtn", group_size=32, progress=False)
    name = FAMILIES[family][0]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written[name.format(1)], scale.astype(np.float16))
    assert np.array_equal(written[name.format(0)], np.ones(size, np.float16))  # transformers has no default
    made = checkpoint.open(tmp_path / "out")
    assert np.array_equal(made.layer(1).act_scale, scale.astype(np.float16)) and made.layer(0).act_scale is None


def test_what_is_wrong_is_named(tmp_path):
    size = saved(tmp_path / "plain", "mpt", {}).config.intermediate_size
    with pytest.raises(CheckpointError, match=rf"blocks.0.ffn.act.scales.* has shape \[5\]; expected is \[{size}\]"):
        broken(tmp_path / "shape", np.ones(5, np.float16))
    with pytest.raises(CheckpointError, match=r"blocks.0.ffn.act.scales.* has a zero, and activations are divided"):
        broken(tmp_path / "zero", np.arange(size, dtype=np.float16)).layer(0)
    with pytest.raises(CheckpointError, match=r"blocks.0.ffn.act.scales.* holds NaN or infinity"):
        broken(tmp_path / "nan", np.full(size, np.nan, np.float16)).layer(0)


def broken(directory, scale):
    path = saved(directory, "mpt", {}).path
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "transformer.blocks.0.ffn.act.scales": scale}, path / "model.safetensors")
    return checkpoint.open(path)


@pytest.mark.parametrize(("family", "bits"), [("mpt", 4), ("mpt", 3), ("phi", 4)])
def test_scales_are_made_where_other_engines_read_them(tmp_path, family, bits):
    """In AWQ's layout, of families for which AutoAWQ has a name; elsewhere they would be passed over there."""
    if family == "mpt":
        path = saved(tmp_path / "source", "mpt", {}).path
    else:
        model, config = tiny(family, hidden_size=64, intermediate_size=128, num_attention_heads=4)
        path = tmp_path / "source"
        path.mkdir()
        save_file({k: v.numpy().copy() for k, v in model.state_dict().items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
    small = {"group_size": 32, "n_sequences": 4, "length": 24, "progress": False}
    report = quantize.quantize(path, tmp_path / "out", bits=bits, **small)
    groups = {result.group for result in report.groups}
    scaled = any(name.endswith(".scales") and ".act." in name for name in load_file(tmp_path / "out/model.safetensors"))
    assert scaled == ("act_scale -> down" in groups) == (family == "mpt" and bits == 4)
    assert scaled != any("engines would not find the scales" in note for note in report.notes)


def test_names():
    assert TensorNames().act_scale == ""
    bloom = TensorNames(layer="h.{}.").renamed(act_scale="mlp.gelu_impl.scales")
    assert bloom.vector("act_scale", 0) == "h.0.mlp.gelu_impl.scales"
