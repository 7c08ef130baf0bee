"""Families whose files keep query, key and value heads together: what is read, written and read again."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_architectures import TOLERANCE, ours, theirs, tokens
from tiny_models import tiny

from tinychat import checkpoint, quantize
from tinychat.backends import cpu, reference
from tinychat.checkpoint import heads
from tinychat.qtensor import canonical
from tinychat.weights import Linear

MODELS = {
    "falcon, 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon, one for each": ("falcon", {"multi_query": False, "parallel_attn": False}),
    "falcon, 7B": ("falcon", {}),
    "mpt": ("mpt", {}),
}
SIZES = {
    "falcon": {"hidden_size": 64, "num_attention_heads": 8, "ffn_hidden_size": 128},
    "mpt": {"d_model": 64, "n_heads": 4},
}


def saved(directory, name):
    """(directory of a checkpoint, transformers' model)."""
    family, changes = MODELS[name]
    model, config = tiny(family, **{**SIZES[family], **changes})
    state = {k: v.numpy().copy() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    directory.mkdir()
    save_file(state, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory, model


@pytest.mark.parametrize("bits", [4, 8])  # AWQ, GPTQ
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_and_what_is_quantized_from_it(name, bits, tmp_path):
    path, model = saved(tmp_path / "float", name)
    ids = tokens(23)
    want = theirs(model, ids)
    source = checkpoint.open(path)
    backends = [module for module in (reference, cpu) if module.available() is None]
    for backend in backends:
        assert np.abs(ours(source, ids, [20, 3], backend) - want).max() < TOLERANCE
    quantize.quantize(path, tmp_path / "made", method="rtn", bits=bits, group_size=32)
    made = checkpoint.open(tmp_path / "made")
    for index in range(2):
        for linear in ("qkv", "out", "up", "down"):
            before, after = (getattr(s.layer(index), linear) for s in (source, made))
            (segment,) = after.segments
            step = np.abs(before.segments[0]).reshape(len(before.segments[0]), -1, 32).max(-1) * 2 / (2**bits - 1)
            error = np.abs(canonical(segment).dequantize() - before.segments[0]).reshape(*step.shape, 32).max(-1)
            assert (error <= 0.52 * step + 1e-3).all(), linear
            if before.bias is not None:
                np.testing.assert_allclose(after.bias, before.bias, rtol=1e-3, atol=1e-6)
    first = ours(made, ids, [20, 3], reference)
    least, most = (1e-4, 0.1) if bits == 4 else (1e-7, 1e-3)
    assert least < ((first - want) ** 2).sum() / (want**2).sum() < most
    for backend in backends[1:]:
        found = ours(made, ids, [20, 3], backend)
        assert ((found - first) ** 2).sum() / (first**2).sum() < 1e-6


def test_apart_and_together_are_inverse():
    from tinychat import architectures

    _, hf_config = tiny("falcon", **SIZES["falcon"], **MODELS["falcon, 40B"][1])
    config, _ = architectures.translate(hf_config)
    rows = np.arange(12 * 8, dtype=np.float32)
    linear = Linear((np.repeat(rows[:, None], 3, 1),), rows)
    moved = heads.apart(linear, config)
    file_heads = moved.bias[::8] / 8  # two groups of 4 queries, a key and a value
    assert file_heads.tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 4, 10, 5, 11]
    assert np.array_equal(moved.segments[0][:, 0], moved.bias)
    again = heads.together(moved, config)
    assert np.array_equal(again.bias, rows) and np.array_equal(again.segments[0], linear.segments[0])
