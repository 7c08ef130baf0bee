"""The shipped checkpoint, read by someone who has only the format's description and numpy: their logits are ours."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import tinychat
from tinychat import checkpoint


def dequantize(tensors, name):
    """qweight int32 [K, N/8]; nibble i of a word is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]; w = (q - z) * s."""
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].astype(np.float64)

    def nibbles(words):  # int32 [rows, N/8] -> [rows, N]
        out = np.empty((words.shape[0], words.shape[1], 8), np.int64)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out[:, :, column] = (words.astype(np.int64) >> 4 * i) & 15
        return out.reshape(words.shape[0], -1)

    q, z = nibbles(tensors[f"{name}.qweight"]), nibbles(tensors[f"{name}.qzeros"])
    s = tensors[f"{name}.scales"].astype(np.float64)
    group = q.shape[0] // z.shape[0]
    return ((q - z.repeat(group, 0)) * s.repeat(group, 0)).T  # [N, K]


def llama_logits(tensors, config, ids):
    """A Llama forward pass in float64, one position after another in the notation of the paper, nothing cached."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * tensors[f"{name}.weight"]

    def rotate(x):  # [T, heads, dim]
        angle = np.arange(len(ids))[:, None, None] / theta ** (np.arange(0, dim, 2) / dim)
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    hidden = tensors["model.embed_tokens.weight"][ids].astype(np.float64)
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = norm(hidden, f"{layer}.input_layernorm")
        q, k, v = (x @ dequantize(tensors, f"{layer}.self_attn.{p}_proj").T for p in "qkv")
        q = rotate(q.reshape(len(ids), heads, dim))
        k = rotate(k.reshape(len(ids), kv_heads, dim)).repeat(heads // kv_heads, 1)
        v = v.reshape(len(ids), kv_heads, dim).repeat(heads // kv_heads, 1)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(dim) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v).reshape(len(ids), -1)
        hidden = hidden + mixed @ dequantize(tensors, f"{layer}.self_attn.o_proj").T
        x = norm(hidden, f"{layer}.post_attention_layernorm")
        gate, up = (x @ dequantize(tensors, f"{layer}.mlp.{p}_proj").T for p in ("gate", "up"))
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ dequantize(tensors, f"{layer}.mlp.down_proj").T
    return norm(hidden, "model.norm") @ tensors["model.embed_tokens.weight"].astype(np.float64).T


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_pebble_read_with_numpy_alone(device):
    path = checkpoint.locate("pebble")
    config = json.loads((path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    with tinychat.load("pebble", device=device, kv_dtype="fp32", head=16) as llm:
        ids = llm.tokenizer.encode("Once upon a time there was a little stone that wanted to see the sea.")
        ours = llm.logits(ids)
    expected = llama_logits(load_file(path / "model.safetensors"), config, ids)
    assert ((ours - expected) ** 2).mean() / (expected**2).mean() <= 1e-5
