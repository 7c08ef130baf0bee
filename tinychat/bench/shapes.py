"""Shapes of published models: their config.json as Hugging Face's hub has it, and the groups of their 4-bit versions.

Data, from which `tinychat.architectures` makes the same ModelConfig as from a checkpoint, and which a checkpoint of
random weights carries as it is. What does not change the network (token ids, training) is left out but for what other
engines insist on; the dtype is fp16, as in AWQ checkpoints of these models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tinychat import settings
from tinychat.architectures import translate
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig
from tinychat.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """A model without its weights."""

    hf_config: dict[str, Any]
    group_size: int = 128

    def translate(self) -> tuple[ModelConfig, TensorNames]:
        """As `architectures.translate`; ConfigError for a family that is not implemented."""
        return translate(self.hf_config)


def find(name: str) -> Shape:
    """The shape called `name`; UsageError, with the nearest and all there are, where there is none."""
    if name in SHAPES:
        return SHAPES[name]
    raise UsageError(f"no shape {name!r}{settings.suggest(name, SHAPES)}; there are: {', '.join(SHAPES)}")


def _llama(**config: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
        **config,
    }


def _qwen3(**config: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "float16",
        **config,
    }


SHAPES = {
    "llama-2-7b": Shape(
        _llama(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rope_theta=10000.0,
        )
    ),
    "tinyllama-1.1b": Shape(
        _llama(
            vocab_size=32000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            rope_theta=10000.0,
        )
    ),
    "llama-3-8b": Shape(  # 3.1: the one with 128k positions
        _llama(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            bos_token_id=128000,
            eos_token_id=128001,
        )
    ),
    "smollm2-360m": Shape(
        _llama(
            vocab_size=49152,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            max_position_embeddings=8192,
            rope_theta=100000,
            tie_word_embeddings=True,
        ),
        group_size=64,  # 960 = 15 * 64 inputs
    ),
    "llama-3.2-3b": Shape(
        _llama(
            vocab_size=128256,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
        )
    ),
    "qwen3-0.6b": Shape(_qwen3(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16)),
    "qwen3-4b": Shape(_qwen3(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32)),
    "mixtral-8x7b": Shape(
        _llama(
            architectures=["MixtralForCausalLM"],
            model_type="mixtral",
            attention_bias=None,  # no such keys here: null is as good as absent
            mlp_bias=None,
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=1e6,
            num_local_experts=8,
            num_experts_per_tok=2,
        )
    ),
    "qwen1.5-moe-a2.7b": Shape(
        {
            **_qwen3(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16),
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "attention_bias": None,  # no such keys here
            "head_dim": None,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        }
    ),
    "qwen3-30b-a3b": Shape(
        {
            **_qwen3(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32),
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
        }
    ),
    "mpt-7b": Shape(
        {
            "architectures": ["MPTForCausalLM"],
            "model_type": "mpt",
            "d_model": 4096,
            "n_heads": 32,
            "n_layers": 32,
            "expansion_ratio": 4,
            "max_seq_len": 2048,
            "vocab_size": 50432,
            "no_bias": True,
            "learned_pos_emb": True,  # not used: ALiBi is on
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": 8,
                "attn_impl": "torch",
                "attn_pdrop": 0,
                "attn_type": "multihead_attention",
                "attn_uses_sequence_id": False,
                "clip_qkv": None,
                "prefix_lm": False,
                "qk_ln": False,
                "softmax_scale": None,
            },
            "emb_pdrop": 0,
            "resid_pdrop": 0,
            "embedding_fraction": 1.0,
            "logit_scale": None,
            "norm_type": "low_precision_layernorm",
            "use_cache": False,
            "torch_dtype": "float16",
        }
    ),
    "falcon-7b": Shape(
        {
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "vocab_size": 65024,
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "alibi": False,
            "bias": False,
            "layer_norm_epsilon": 1e-5,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "initializer_range": 0.02,
            "apply_residual_connection_post_layernorm": False,
            "bos_token_id": 11,
            "eos_token_id": 11,
            "use_cache": True,
            "torch_dtype": "float16",
        },
        group_size=64,  # 4544 = 71 * 64 inputs
    ),
}
