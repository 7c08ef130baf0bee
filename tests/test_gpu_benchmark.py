"""benchmarks/gpu.py: the plain model that ours is compared with computes what a decoder computes."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import memory_weights, tiny

from tinychat.backends import reference
from tinychat.bench import shapes
from tinychat.cache import Rows

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_plain

PROMPT = np.random.default_rng(0).integers(0, 97, 12)
FALCON = {"multi_query": True, "new_decoder_architecture": False, "parallel_attn": True}


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen3", {}), ("mpt", {}), ("falcon", FALCON)])
def test_the_plain_model_is_that_of_the_reference(family, changes):
    weights = memory_weights(*tiny(family, **changes))
    plain = gpu_plain.Plain(weights.config, 16)
    state = {"embed.weight": weights.embedding, "norm.weight": weights.final_norm}
    if weights.final_norm_bias is not None:
        state["norm.bias"] = weights.final_norm_bias
    if weights.output_head is not None:
        state["head.weight"] = weights.output_head.segments[0]
    for index, layer in enumerate(weights.layers):
        for name in ("qkv", "out", "up", "down"):
            state[f"layers.{index}.{name}.weight"] = np.concatenate(getattr(layer, name).segments)
        for name in ("norm1", "norm2", "q_norm", "k_norm"):
            for field, key in ((name, "weight"), (f"{name}_bias", "bias")):
                if getattr(layer, field, None) is not None:
                    state[f"layers.{index}.{name}.{key}"] = getattr(layer, field)
    given = {name: torch.from_numpy(np.array(values)) for name, values in state.items()}
    missing = set(dict(plain.named_parameters())) - set(given)
    assert not missing and not plain.load_state_dict(given, strict=False).unexpected_keys
    want = reference.build(weights, ctx_size=16).step(Rows.of(PROMPT, 0, wanted="all"))
    with torch.inference_mode():
        got = [plain(torch.from_numpy(PROMPT[:6]), torch.arange(6))]
        got += [plain(torch.tensor([PROMPT[at]]), torch.tensor([at])) for at in range(6, 12)]
    np.testing.assert_allclose(torch.cat(got), want[5:], atol=1e-4)


def test_what_is_found_is_kept_as_it_comes(tmp_path):
    """One contender that fails loses nothing of the others; the table names why."""

    def fails(subject):
        raise RuntimeError("no such thing\nsecond line")

    def works(subject):
        return {"tokens_per_second": 123.4, "fraction": 0.5}

    results = gpu.Results(tmp_path)
    for name, contender in (("a", works), ("b", fails)):
        gpu.attempt(results, "llama-2-7b", name, contender, None)
    text = (tmp_path / "gpu.md").read_text()
    assert "123.4" in text and "no such thing" in text
    again = gpu.json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [found["contender"] for found in again] == ["a", "b"] and again[1]["error"].startswith("RuntimeError")
    gpu.attempt(results, "llama-2-7b", "b", works, None)
    assert len(results.found) == 2, "an earlier process has"
    gpu.attempt(results, "llama-2-7b", gpu.BASELINE, lambda shape: {"tokens_per_second": 50.0}, None)
    again = gpu.json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert again[0]["over_hugging_face"] == 123.4 / 50 and "over_hugging_face" in (tmp_path / "gpu.md").read_text()


def test_a_process_whose_gpu_is_broken_is_left(monkeypatch, tmp_path):
    def fails(*ignored):
        raise RuntimeError("an illegal memory access was encountered")

    left = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(gpu.os, "execv", lambda program, arguments: left.extend(arguments[1:]))
    monkeypatch.setattr(gpu.sys, "argv", ["gpu.py", "--out", "x"])
    gpu.attempt(gpu.Results(tmp_path), "llama-2-7b", "a", fails, gpu.time.monotonic() + 60)
    assert left[:5] == ["gpu.py", "--out", "x", "--go-on", "--minutes"] and 0.9 < float(left[5]) <= 1


TINY = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def test_contenders_run(monkeypatch):
    """On the CPU, those that need no GPU of their own."""
    config = {**shapes.SHAPES["llama-2-7b"].hf_config, **TINY, **TINY_HEADS}
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape(config))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, value in {"DEVICE": "cpu", "TOKENS": 3, "LONG": 8, "REPEATS": 1, "CAPACITY": 16}.items():
        monkeypatch.setattr(gpu, name, value)
    for contender in (gpu.huggingface, gpu.plain("eager")):
        assert contender("tiny")["tokens_per_second"] > 0
    assert gpu.huggingface_first_token("tiny")["seconds"] > 0


def test_hugging_face_builds_the_shapes(monkeypatch):
    """Their config.json, cut down: the models that random weights are put into."""
    for name in gpu.SHAPES:
        config = gpu.hf_config(shapes.find(name))
        for key, value in (("num_hidden_layers", 1), ("n_layers", 1), ("vocab_size", 100)):
            if hasattr(config, key):
                setattr(config, key, value)
        assert type(config).model_type == shapes.find(name).hf_config["model_type"]
