"""Tiny random models of transformers, and the same weights under our canonical names."""

from __future__ import annotations

import numpy as np
import torch
from tiny_families import BASES as OTHERS
from tiny_families import IDS
from transformers import AutoConfig, AutoModelForCausalLM

from tinychat import architectures
from tinychat.checkpoint import heads, vectors
from tinychat.config import Block
from tinychat.weights import Ends, Layer, Linear, MemoryWeights, norm_sizes

# Awkward on purpose: nothing is a power of two or a multiple of 64 but what a test sets.
BASE = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 107,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Families whose keys are their own.
BASES = {
    **OTHERS,
    "mpt": {"vocab_size": 97, "d_model": 60, "n_heads": 6, "n_layers": 2, "max_seq_len": 256, **IDS},
    "falcon": {
        "vocab_size": 97,
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "ffn_hidden_size": 107,
        "max_position_embeddings": 256,
        **IDS,
    },
}


def tiny(
    model_type: str, *, seed: int = 0, scale: float = 0.1, attention: str = "eager", **overrides
) -> tuple[AutoModelForCausalLM, dict]:
    """(model, its config.json as a dict): fp32, every parameter random, norms and biases too.

    `scale` is the standard deviation of matrices; logits then have a standard deviation near 1.
    """
    config = AutoConfig.for_model(model_type, **{**BASES.get(model_type, BASE), **overrides})
    config._attn_implementation = attention
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.ndim == 1 and name.endswith(".weight")
            parameter.copy_(1 + 0.2 * noise if norm else scale * noise)
    return model, {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "float32"}


def memory_weights(model: AutoModelForCausalLM, hf_config: dict) -> MemoryWeights:
    """The model's weights under our names: every tensor of its state dict is used, or an assertion fails."""
    config, names = architectures.translate(hf_config)
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    if config.tied_head:
        assert np.array_equal(state.pop(f"{names.head}.weight"), state[f"{names.embed}.weight"])

    def linear(*modules: str) -> Linear:
        biases = [state.pop(f"{m}.bias") for m in modules if f"{m}.bias" in state]
        assert len(biases) in (0, len(modules))
        return Linear(tuple(state.pop(f"{m}.weight") for m in modules), np.concatenate(biases) if biases else None)

    def norm(tensor: str) -> np.ndarray:
        values = state.pop(tensor)
        return values + np.float32(names.norm_offset if values.ndim == 1 and tensor.endswith(".weight") else 0)

    def layer(index: int) -> Layer:
        at = names.layer.format(index)
        qkv = linear(*(at + m for m in names.qkv))
        norms = {name: np.ones(size, np.float32) for name, size in norm_sizes(config).items()}
        norms |= {name: norm(tensor) for name, (tensor, _) in vectors.vectors(config, names, index).items()}
        made = Layer(
            **norms,
            qkv=heads.apart(qkv, config) if names.heads_interleaved else qkv,
            out=linear(*(at + m for m in names.out)),
            up=linear(*(at + m for m in names.up)),
            down=linear(*(at + m for m in names.down)),
        )
        present = {n for n in ("qkv", "out", "up", "down") if getattr(made, n).bias is not None}
        assert present == config.biases - {"head"}
        return made

    ends = {name: norm(tensor) for name, (tensor, _) in vectors.ends(config, names).items()}
    final = ends.pop("final_norm", None if config.block is Block.POST_NORM else np.ones(config.hidden_size, np.float32))
    final_bias = ends.pop("final_norm_bias", None)
    ends |= {name: Linear((ends[name],)) for name in ends if name.startswith("project")}
    weights = MemoryWeights(
        config=config,
        embedding=state.pop(f"{names.embed}.weight"),
        layers=[layer(index) for index in range(config.n_layers)],
        final_norm=final,
        final_norm_bias=final_bias,
        output_head=None if config.tied_head else linear(names.head),
        other_ends=Ends(**ends),
    )
    assert not state, f"left over: {sorted(state)}"
    return weights
