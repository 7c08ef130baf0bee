"""A llama model of random weights as an AWQ checkpoint, 4 bits in groups of 128; embedding and head in fp16.

Its config.json is the one description of the shape, from which the other peers' models are made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tinychat.checkpoint import AwqFormat, CheckpointWriter, awq
from tinychat.qtensor import QTensor

GROUP_SIZE = 128
SHAPES = {  # hidden size, inner size, layers, heads, key and value heads
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4),
    "llama-2-7b": (4096, 11008, 32, 32, 32),
}


def config(shape: str) -> dict:
    """The shape as Hugging Face's config.json of a llama model."""
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }


def write(shape: str, folder: Path) -> None:
    """The checkpoint at `folder`: random codes and zeros, scaled for outputs about as large as the inputs."""
    rng = np.random.default_rng(0)
    hidden, inner, layers, heads, kv_heads = SHAPES[shape]
    kv, vocab = hidden // heads * kv_heads, config(shape)["vocab_size"]
    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    with CheckpointWriter(folder) as writer:
        writer.add("model.embed_tokens.weight", rng.standard_normal((vocab, hidden), np.float32).astype(np.float16))
        head = rng.standard_normal((vocab, hidden), np.float32) / hidden**0.5
        writer.add("lm_head.weight", head.astype(np.float16))
        writer.add("model.norm.weight", np.ones(hidden, np.float16))
        for index in range(layers):
            prefix = f"model.layers.{index}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"{prefix}.{norm}.weight", np.ones(hidden, np.float16))
            for name, (n, k) in linears.items():
                codes, zeros = (rng.integers(0, 16, size, np.uint8) for size in ((n, k), (n, k // GROUP_SIZE)))
                scales = np.full((n, k // GROUP_SIZE), 1 / (6.5 * k**0.5), np.float16)
                for ending, array in awq.pack(QTensor(codes, scales, zeros, awq.BITS, GROUP_SIZE)).items():
                    writer.add(f"{prefix}.{name}.{ending}", array)
        writer.finish(config(shape), AwqFormat(group_size=GROUP_SIZE, modules_to_not_convert=("lm_head",)))
