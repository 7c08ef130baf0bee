"""Tiny random models of transformers, and the same weights under our canonical names."""

from __future__ import annotations

import numpy as np
import torch
from tiny_families import BASES as OTHERS
from tiny_families import IDS
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tinychat import architectures
from tinychat.checkpoint import heads, vectors
from tinychat.checkpoint.inventory import segments
from tinychat.config import Block
from tinychat.weights import Ends, Layer, Linear, MemoryWeights, linears, norm_sizes

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

# Of families with experts: as in BASE, and these.
MIXTURES = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 21,
        "shared_expert_intermediate_size": 50,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 9, "num_experts_per_tok": 4, "moe_intermediate_size": 19},
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
    base = BASES.get(model_type) or {**BASE, **MIXTURES.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **{**base, **overrides})
    config._attn_implementation = attention
    config._experts_implementation = "eager"  # the other ways want sizes of a multiple of 16 bytes
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
    tensors = revert_weight_conversion(model, model.state_dict())  # as in files: experts one by one
    state = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
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
        parts = {name: segments(config, names, name, index) for name in linears(config, index)}
        made = {name: linear(*(part.module for part in found)) for name, found in parts.items()}
        norms = {name: np.ones(size, np.float32) for name, size in norm_sizes(config).items()}
        norms |= {name: norm(tensor) for name, (tensor, _) in vectors.vectors(config, names, index).items()}
        if names.heads_interleaved:
            made["qkv"] = heads.apart(made["qkv"], config)
        present = {name for name, found in made.items() if found.bias is not None}
        assert present == config.biases - {"head"}
        return Layer(**norms, **made)

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
