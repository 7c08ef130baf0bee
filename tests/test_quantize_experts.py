"""Experts in the quantizer: one scale for all that read a norm, each expert by its own tokens, on to a file."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_architectures import ours, tokens
from test_experts import SIZES_OF, mixture
from test_lowered_decoder import build, ids, nmse
from tiny_models import tiny

import tinychat
from tinychat import checkpoint
from tinychat.cache import Rows
from tinychat.qtensor import QTensor
from tinychat.quantize import quantize, quantize_in_memory
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import dense_layer, linears_of

TEXT = [ids(48, 97, seed=seed).tolist() for seed in range(8)]


def test_experts_see_the_tokens_that_go_to_them():
    weights = mixture(n=8, used=2)
    activations = Activations(weights.config, weights.embedding, TEXT, 10_000)
    dense = dense_layer(weights.layers[0], lambda name, i, shape: (name, None))
    observed = activations.advance(dense, 0, grams=True)
    rows = {
        name: sum(len(s.inputs[name]) for s in (*observed.samples, *observed.held_out)) for name in linears_of(dense)
    }
    assert rows["router"] == rows["shared_up"] == 8 * 48
    assert sum(rows[f"up.{i}"] for i in range(8)) == 2 * 8 * 48
    assert all(rows[f"up.{i}"] == rows[f"down.{i}"] for i in range(8))
    x = torch.cat([s.inputs["down.3"] for s in (*observed.samples, *observed.held_out)])
    torch.testing.assert_close(observed.magnitude["down.3"], x.abs().mean(0))
    torch.testing.assert_close(observed.grams["down.3"].taken(), x.T @ x)


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "awq+gptq"])
def test_every_method_takes_experts(method):
    weights = mixture(n=6, used=2, layers=1, sparse=(0,), inter=64)
    made, report = quantize_in_memory(weights, method=method, bits=3, group_size=32, sequences=TEXT)
    (layer,) = made.layers
    assert all(isinstance(s, np.ndarray) and s.dtype == np.float16 for s in layer.router.segments)
    stacked = (*layer.up.segments, *layer.down.segments, *layer.shared_up.segments, *layer.shared_down.segments)
    assert all(isinstance(segment, QTensor) for segment in stacked)
    assert report.quantized_weights == sum(s.codes.size for s in (*stacked, *layer.qkv.segments, *layer.out.segments))
    assert set(report.kept) == {"layers.0.router[0]", "layers.0.router[1]"}
    for result in report.groups:
        assert result.loss <= result.loss_rtn, result
    if "awq" in method:
        names = [result.group.removesuffix(", awq alone") for result in report.groups]
        assert names.count("up -> down") == 6 and "norm2 -> router, shared_up, up" in names
        assert "shared_up -> shared_down" in names
    assert "up" in str(report)


def test_experts_without_tokens_are_rounded_and_named():
    """GPTQ's without any, and those to which too few of the sampled tokens went for a search."""
    weights = mixture(n=24, used=1, layers=1, sparse=(0,), inter=32, shared=0)
    plain, _ = quantize_in_memory(weights, method="rtn", bits=4, group_size=32)
    for method, text in (("awq", TEXT), ("gptq", [TEXT[0][:10]])):
        made, report = quantize_in_memory(weights, method=method, bits=4, group_size=32, sequences=text)
        (note,) = [note for note in report.notes if "want of tokens" in note]
        idle = [int(expert) for expert in note.rpartition("experts ")[2].split(", ")]
        assert 14 <= len(idle) < 24
        for expert in range(24):
            found, nearest = (w.layers[0].down.segments[expert].codes for w in (made, plain))
            if expert in idle:
                np.testing.assert_array_equal(found, nearest)
        assert any(
            (made.layers[0].down.segments[e].codes != plain.layers[0].down.segments[e].codes).any() for e in range(24)
        )


WORDS, PLAIN = {"qweight", "qzeros", "scales"}, {"weight"}
PUBLISHED = {  # modules of the files that the community and Qwen publish in AWQ's layout, and their tensors
    "mixtral": {
        **{f"block_sparse_moe.experts.{i}.w{j}": WORDS for i in range(5) for j in (1, 2, 3)},
        "block_sparse_moe.gate": PLAIN,
    },
    "qwen2_moe": {
        "mlp.experts.6.gate_proj": WORDS,
        "mlp.experts.0.up_proj": WORDS,
        "mlp.experts.3.down_proj": WORDS,
        "mlp.shared_expert.gate_proj": WORDS,
        "mlp.shared_expert.down_proj": WORDS,
        "mlp.shared_expert_gate": PLAIN,
        "mlp.gate": PLAIN,
    },
    "qwen3_moe": {
        **{f"mlp.experts.{i}.{part}_proj": WORDS for i in range(9) for part in ("gate", "up", "down")},
        "mlp.gate": PLAIN,
    },
}


@pytest.mark.parametrize(("family", "method"), [("mixtral", "gptq"), ("qwen2_moe", "awq"), ("qwen3_moe", "rtn")])
def test_a_checkpoint_is_quantized_and_runs(family, method, tmp_path):
    model, config = tiny(family, **SIZES_OF[family])
    model.save_pretrained(tmp_path / "plain")
    options = {"method": method, "group_size": 32, "n_sequences": 4, "length": 32, "progress": False}
    report = quantize(tmp_path / "plain", tmp_path / "q", **options)
    found = checkpoint.open(tmp_path / "q")
    assert found.n_quantized == report.quantized_weights
    tensors = load_file(tmp_path / "q/model.safetensors")
    for module, endings in PUBLISHED[family].items():
        module = f"model.layers.0.{module}"
        assert {name.removeprefix(f"{module}.") for name in tensors if name.startswith(f"{module}.")} == endings
    assert not any(name.endswith(".weight") and ".experts." in name for name in tensors)
    routers = [module for module in report.kept if module.endswith("gate")]
    assert routers and set(routers) <= set(found.hf_config["quantization_config"]["modules_to_not_convert"])
    exact, text = checkpoint.open(tmp_path / "plain"), tokens(20, config["vocab_size"]).astype(np.int32)
    want = build(exact).step(Rows.of(text, 0, wanted="all"))
    assert nmse(ours(found, text, [20]), want) < 0.2  # where an expert changes, so does much
    lowered = build(found)
    y = [lowered.step(Rows.of(text[:15], 0, wanted="all")), lowered.step(Rows.of(text[15:], 15, wanted="all"))]
    assert nmse(np.concatenate(y), ours(found, text, [20])) < 1e-5
    with tinychat.load(tmp_path / "q", device="cpu") as llm:
        answer = tinychat.generate(llm, text.tolist(), max_tokens=8, temperature=0, ignore_eos=True)
    assert len(answer.tokens) == 8 and answer.tokens[0] == int(y[1][-1].argmax())
