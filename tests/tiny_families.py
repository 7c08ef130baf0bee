"""Tiny configurations of the families beyond Llama's closest kin: awkward sizes, one for each of their variants.

BASES: keys of config.json that every variant of a family has; CASES: what each variant changes. A family found in
`tinychat/architectures/` without a variant here or in test_architectures.py fails there.
"""

IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SIZES = {"vocab_size": 97, "hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 6, **IDS}
LONG = {"max_position_embeddings": 256, "intermediate_size": 107}
BASES = {
    "opt": {**SIZES, "ffn_dim": 107, "max_position_embeddings": 64, "word_embed_proj_dim": 60},
    "gpt_neox": {**SIZES, **LONG, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}},
    "gpt_bigcode": {
        "vocab_size": 97,
        "n_embd": 60,
        "n_layer": 3,
        "n_head": 6,
        "n_positions": 64,
        "n_inner": 107,
        **IDS,
    },
    "starcoder2": {**SIZES, **LONG, "num_key_value_heads": 2},
    "bloom": {"vocab_size": 97, "hidden_size": 60, "n_layer": 3, "n_head": 6, **IDS},
    "phi": {**SIZES, **LONG, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}},
    "stablelm": {
        **SIZES,
        **LONG,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4},
    },
}
LLAMA = {**SIZES, **LONG, "num_key_value_heads": 2, "num_hidden_layers": 4}
HALVES = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 5.0, 9.0]}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
BASES |= {
    "gemma": {**LLAMA, "head_dim": 14},
    "gemma2": {**LLAMA, "head_dim": 14, "sliding_window": 5, "query_pre_attn_scalar": 20},
    "gemma3_text": {**LLAMA, "head_dim": 14, "sliding_window": 5, "query_pre_attn_scalar": 20},
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "smollm3": LLAMA,
    "granite": LLAMA,
    "phi3": {**LLAMA, "original_max_position_embeddings": 256},
    "cohere": {**LLAMA, "logit_scale": 0.8},
    "cohere2": {**LLAMA, "logit_scale": 0.8, "sliding_window": 5, "num_hidden_layers": 5},
}
CASES = {
    "cohere": {
        "Command R": {},
        "biases, a head of its own": {"attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 6},
    },
    "cohere2": {
        "Command R7B": {},
        "windows elsewhere": {
            "attention_bias": True,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2],
        },
    },
    "opt": {
        "125M to 66B": {},
        "350M": {"do_layer_norm_before": False, "word_embed_proj_dim": 28},
        "no biases, a head of its own": {"enable_bias": False, "tie_word_embeddings": False},
        "GELU, as Galactica": {"activation_function": "gelu", "num_attention_heads": 5},
    },
    "gpt_neox": {
        "Pythia": {},
        "20B": {"hidden_act": "gelu_fast", "tie_word_embeddings": True},
        "sequential": {"use_parallel_residual": False},
        "no attention bias, all of a head turns": {
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
        },
    },
    "gpt_bigcode": {
        "StarCoder": {},
        "a key-value head each": {"multi_query": False, "n_inner": None},
        "erf, scores as they are": {"activation_function": "gelu", "scale_attn_weights": False},
    },
    "starcoder2": {
        "3B": {"sliding_window": 5},
        "no window, no biases": {"use_bias": False, "tie_word_embeddings": False},
    },
    "bloom": {"560M": {}, "heads of a power of two": {"n_head": 4, "hidden_size": 64, "tie_word_embeddings": False}},
    "phi": {"2": {}, "tied, grouped queries": {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 48}},
    "stablelm": {
        "3B": {},
        "2 1.6B": {"use_qkv_bias": True},
        "parallel": {"use_parallel_residual": True, "tie_word_embeddings": True, "num_attention_heads": 4},
    },
    "gemma": {
        "2B": {"num_key_value_heads": 1},
        "a head of its own, biases": {"tie_word_embeddings": False, "attention_bias": True},
    },
    "gemma2": {
        "2B": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "no caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    },
    "gemma3_text": {
        "1B": {"sliding_window_pattern": 3},
        "two ropes, one stretched": {"rope_parameters": TWO_ROPES, "num_hidden_layers": 7},
        "capped": {"final_logit_softcapping": 3.0},
    },
    "olmo": {"1B": {}, "7B": {"clip_qkv": 0.6, "num_key_value_heads": 6}, "biases": {"attention_bias": True}},
    "olmo2": {
        "7B": {"num_key_value_heads": 6},
        "32B": {},
        "tied, biases": {"tie_word_embeddings": True, "attention_bias": True},
    },
    "smollm3": {
        "3B": {},
        "windows where nothing turns": {
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layers": [1, 0, 1, 0],
        },
        "nothing turns": {"no_rope_layers": [0] * 4, "attention_bias": True, "mlp_bias": True},
    },
    "granite": {
        "3.1 2B": {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 1.6,
            "tie_word_embeddings": True,
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "logits_scaling": 0.5, "attention_multiplier": 0.3},
    },
    "phi3": {
        "mini 4k": {"sliding_window": 5},
        "long, short texts": {
            "hidden_size": 48,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", **HALVES},
        },
        "long, long texts": {
            "hidden_size": 48,
            "original_max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "longrope", **HALVES},
        },
        "4 mini": {
            "hidden_size": 60,
            "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.8, **HALVES},
            "tie_word_embeddings": True,
        },
    },
}

# Sizes that fit groups of 32 and words of 8, by the families' own keys.
WHOLE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
QUARTER = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}
OWN_KEYS = {
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 96, "do_layer_norm_before": False},
    "gpt_neox": {**WHOLE, **QUARTER},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96},
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96},
    "phi": {**WHOLE, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "stablelm": {**WHOLE, **QUARTER},
    "qwen2_moe": {**WHOLE, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**WHOLE, "head_dim": 16, "moe_intermediate_size": 32},
}


def whole_words(family: str) -> dict:
    """What to change of a family's tiny model so that every linear of it can be quantized."""
    return OWN_KEYS.get(family) or {**WHOLE, "head_dim": 16}
