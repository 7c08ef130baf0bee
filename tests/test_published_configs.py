"""config.json of checkpoints as they lie on the hub, beside those of test_config_translation.py: all of their keys are
known, and what is special of each is found."""

import pytest

from tinychat import architectures
from tinychat.config import Activation, Block, Experts, QKNorm, RopeScaling

SAVED = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "transformers_version": "4.43",
    "use_cache": True,
}


def sizes(hidden: int, layers: int, heads: int, mlp: int, vocab: int, positions: int, **others) -> dict:
    """The keys that most have."""
    return {
        **SAVED,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        **others,
    }


LLAMA_2 = sizes(
    4096, 32, 32, 11008, 32000, 4096, model_type="llama", rms_norm_eps=1e-5, pretraining_tp=1, rope_scaling=None
)
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
OPT = {
    **SAVED,
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "attention_dropout": 0.0,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "ffn_dim": 16384,
    "hidden_size": 4096,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 4096,
}
BLOOM = {
    **SAVED,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "unk_token_id": 0,
    "vocab_size": 250880,
}
STARCODER = {
    **SAVED,
    "activation_function": "gelu",
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "inference_runner": 0,
    "layer_norm_epsilon": 1e-5,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
REFINED_WEB = {
    **SAVED,
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "layer_norm_epsilon": 1e-5,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 65024,
}
GEMMA_3_1B = sizes(1152, 26, 4, 6912, 262144, 32768, model_type="gemma3_text", num_key_value_heads=1, head_dim=256)
GEMMA_3_1B |= {"attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None}
GEMMA_3_1B |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6}
GEMMA_3_1B |= {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512}
COMMAND_R = sizes(8192, 40, 64, 22528, 256000, 8192, model_type="cohere", num_key_value_heads=64, logit_scale=0.0625)
COMMAND_R |= {"attention_bias": False, "hidden_act": "silu", "layer_norm_eps": 1e-5, "rope_theta": 8e6}
PHI_3 = sizes(3072, 32, 32, 8192, 32064, 131072, model_type="phi3", num_key_value_heads=32, rms_norm_eps=1e-5)
PHI_3 |= {"attention_bias": False, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "original_max_position_embeddings": 4096}
PHI_3 |= {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "rope_theta": 10000.0, "sliding_window": 262144}

# name: (config.json, what a ModelConfig of it has)
PUBLISHED = {
    "Vicuna 7B 1.5 16k": (
        {
            **LLAMA_2,
            "max_length": 4096,
            "temperature": 0.9,
            "top_p": 0.6,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
        {"n_kv_heads": 32, "biases": frozenset()},
    ),
    "CodeLlama 7B": (
        {**LLAMA_2, "rope_theta": 1000000, "vocab_size": 32016, "max_position_embeddings": 16384},
        {"max_positions": 16384, "vocab_size": 32016},
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        {
            **sizes(4096, 32, 32, 14336, 128256, 131072, model_type="llama", num_key_value_heads=8, rms_norm_eps=1e-5),
            **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0},
            "rope_scaling": {**LLAMA_3, "original_max_position_embeddings": 8192},
        },
        {"n_kv_heads": 8, "tied_head": False},
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        {
            **sizes(3584, 28, 28, 18944, 152064, 131072, model_type="qwen2", num_key_value_heads=4, rms_norm_eps=1e-6),
            **{"max_window_layers": 28, "rope_theta": 10000, "sliding_window": 4096, "use_mrope": False},
            **{"tie_word_embeddings": False, "use_sliding_window": False},
        },
        {"biases": frozenset({"qkv"}), "sliding_window": None},
    ),
    "RefinedWeb 40B": (
        {**REFINED_WEB, "model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8, "n_layer": 60},
        {"n_kv_heads": 8, "block": Block.PARALLEL, "intermediate_size": 32768, "head_dim": 64},
    ),
    "RefinedWebModel 7B": (
        {
            **{**REFINED_WEB, "model_type": "RefinedWebModel", "hidden_size": 4544, "n_head": 71, "n_layer": 32},
            "multi_query": True,
        },
        {"n_kv_heads": 1, "block": Block.PARALLEL_ONE_NORM, "tied_head": True},
    ),
    "OPT 6.7B": (OPT, {"position_offset": 2, "embed_size": None, "activation": Activation.RELU}),
    "OPT 350M": (
        {
            **OPT,
            "do_layer_norm_before": False,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
        },
        {"block": Block.POST_NORM, "embed_size": 512},
    ),
    "Galactica": (
        {**OPT, "activation_function": "gelu", "learned_embeddings": True, "scale_embeddings": False},
        {"activation": Activation.GELU},
    ),
    "BLOOM 560M": (BLOOM, {"hidden_size": 1024, "n_heads": 16, "embed_norm": True, "intermediate_size": 4096}),
    "Pythia 70M": (
        {
            **sizes(512, 6, 8, 2048, 50304, 2048, model_type="gpt_neox", hidden_act="gelu", layer_norm_eps=1e-5),
            **{
                "rotary_emb_base": 10000,
                "rotary_pct": 0.25,
                "tie_word_embeddings": False,
                "use_parallel_residual": True,
            },
        },
        {"block": Block.PARALLEL, "activation": Activation.GELU},
    ),
    "GPT-NeoX 20B": (
        {
            **sizes(
                6144, 44, 64, 24576, 50432, 2048, model_type="gpt_neox", hidden_act="gelu_fast", layer_norm_eps=1e-5
            ),
            **{
                "attention_probs_dropout_prob": 0,
                "hidden_dropout_prob": 0,
                "rotary_emb_base": 10000,
                "rotary_pct": 0.25,
            },
        },
        {"head_dim": 96, "activation": Activation.GELU_TANH},
    ),
    "StarCoder": (STARCODER, {"n_kv_heads": 1, "intermediate_size": 24576, "activation": Activation.GELU}),
    "StarCoder2 3B": (
        {
            **sizes(3072, 30, 24, 12288, 49152, 16384, model_type="starcoder2", num_key_value_heads=2),
            **{"attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1, "norm_epsilon": 1e-5},
            **{"hidden_act": "gelu_pytorch_tanh", "layer_norm_epsilon": 1e-5, "mlp_type": "default"},
            **{"norm_type": "layer_norm", "rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": True},
        },
        {"sliding_window": 4096, "windowed_layers": frozenset(range(30)), "tied_head": True},
    ),
    "Phi 2": (
        {
            **sizes(2560, 32, 32, 10240, 51200, 2048, model_type="phi", num_key_value_heads=32, layer_norm_eps=1e-5),
            **{"embd_pdrop": 0.0, "hidden_act": "gelu_new", "partial_rotary_factor": 0.4, "qk_layernorm": False},
            **{"resid_pdrop": 0.1, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False},
        },
        {"block": Block.PARALLEL_ONE_NORM, "biases": frozenset({"qkv", "out", "up", "down", "head"})},
    ),
    "Phi 3.5 mini": (
        {**PHI_3, "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"}},
        {"sliding_window": 262144},
    ),
    "Phi 4 mini": (
        {
            **{**PHI_3, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75},
            **{"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
            "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
            "tie_word_embeddings": True,
        },
        {"head_dim": 128, "tied_head": True},
    ),
    "StableLM 2 1.6B": (
        {
            **sizes(
                2048, 24, 32, 5632, 100352, 4096, model_type="stablelm", num_key_value_heads=32, layer_norm_eps=1e-5
            ),
            **{"hidden_act": "silu", "partial_rotary_factor": 0.25, "rope_theta": 10000, "use_qkv_bias": True},
        },
        {"biases": frozenset({"qkv"}), "norm_bias": True},
    ),
    "Gemma 2B": (
        sizes(
            2048, 18, 8, 16384, 256000, 8192, model_type="gemma", num_key_value_heads=1, head_dim=256, hidden_act="gelu"
        ),
        {"activation": Activation.GELU_TANH, "embed_scale": 2048**0.5, "tied_head": True},
    ),
    "Gemma 2 2B": (
        {
            **sizes(2304, 26, 8, 9216, 256000, 8192, model_type="gemma2", num_key_value_heads=4, head_dim=256),
            **{"attention_bias": False, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            **{"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
            **{"hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0, "sliding_window": 4096},
        },
        {
            "block": Block.SANDWICH,
            "attention_cap": 50.0,
            "logit_cap": 30.0,
            "windowed_layers": frozenset(range(0, 26, 2)),
        },
    ),
    "Gemma 3 1B": (
        {**GEMMA_3_1B, "cache_implementation": "hybrid", "sliding_window_pattern": 6},
        {"windowed_layers": frozenset(range(26)) - {5, 11, 17, 23}, "qk_norm": QKNorm.HEAD},
    ),
    "Gemma 3 270M": (
        {
            **{
                **GEMMA_3_1B,
                "_sliding_window_pattern": 6,
                "use_bidirectional_attention": False,
                "num_hidden_layers": 3,
            },
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {"windowed_layers": frozenset({0, 1})},
    ),
    "OLMo 7B": (
        {
            **sizes(4096, 32, 32, 11008, 50304, 2048, model_type="olmo", num_key_value_heads=32, clip_qkv=8.0),
            **{"attention_bias": False, "hidden_act": "silu", "pretraining_tp": 1, "rope_theta": 10000.0},
        },
        {"clip_qkv": 8.0, "norm_weight": False},
    ),
    "OLMo 2 7B": (
        sizes(
            4096,
            32,
            32,
            11008,
            100352,
            4096,
            model_type="olmo2",
            attention_bias=False,
            rms_norm_eps=1e-6,
            rope_theta=5e5,
        ),
        {"block": Block.NORM_AFTER, "qk_norm": QKNorm.WHOLE},
    ),
    "SmolLM3 3B": (
        {
            **sizes(2048, 4, 16, 11008, 128256, 65536, model_type="smollm3", num_key_value_heads=4, rms_norm_eps=1e-6),
            **{"layer_types": ["full_attention"] * 4, "max_window_layers": 28, "no_rope_layer_interval": 4},
            **{"no_rope_layers": [1, 1, 1, 0], "rope_scaling": None, "rope_theta": 5e6, "sliding_window": None},
            **{"attention_bias": False, "mlp_bias": False, "pretraining_tp": 2, "use_sliding_window": False},
        },
        {"tied_head": True},
    ),
    "Granite 3.1 2B": (
        {
            **sizes(2048, 40, 32, 8192, 49155, 131072, model_type="granite", num_key_value_heads=8, rms_norm_eps=1e-5),
            **{"attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0},
            **{"logits_scaling": 8.0, "mlp_bias": False, "residual_multiplier": 0.22, "rope_theta": 5e6},
        },
        {"logit_scale": 0.125, "embed_scale": 12.0, "residual_scale": 0.22, "attention_scale": 0.015625},
    ),
    "Mixtral 8x7B": (
        {
            **sizes(4096, 32, 32, 14336, 32000, 32768, model_type="mixtral", num_key_value_heads=8, rms_norm_eps=1e-5),
            **{"attention_dropout": 0.0, "hidden_act": "silu", "num_experts_per_tok": 2, "num_local_experts": 8},
            **{"output_router_logits": False, "rope_theta": 1e6, "router_aux_loss_coef": 0.02, "sliding_window": None},
        },
        {"experts": Experts(8, 2, 14336, frozenset(range(32))), "sliding_window": None},
    ),
    "Qwen 1.5 MoE A2.7B": (
        {
            **sizes(2048, 24, 16, 5632, 151936, 8192, model_type="qwen2_moe", num_key_value_heads=16),
            **{"hidden_act": "silu", "decoder_sparse_step": 1, "max_window_layers": 21, "norm_topk_prob": False},
            **{"moe_intermediate_size": 1408, "num_experts": 60, "num_experts_per_tok": 4, "rms_norm_eps": 1e-6},
            **{"output_router_logits": False, "rope_theta": 1e6, "router_aux_loss_coef": 0.001},
            **{"shared_expert_intermediate_size": 5632, "sliding_window": 32768, "use_sliding_window": False},
        },
        {"experts": Experts(60, 4, 1408, frozenset(range(24)), False, 5632), "biases": frozenset({"qkv"})},
    ),
    "Qwen 3 30B-A3B": (
        {
            **sizes(2048, 48, 32, 6144, 151936, 40960, model_type="qwen3_moe", num_key_value_heads=4, head_dim=128),
            **{"attention_bias": False, "decoder_sparse_step": 1, "hidden_act": "silu", "max_window_layers": 48},
            **{"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128},
            **{"num_experts_per_tok": 8, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None},
            **{"rope_theta": 1e6, "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False},
        },
        {"experts": Experts(128, 8, 768, frozenset(range(48))), "qk_norm": QKNorm.HEAD},
    ),
    "Command R": ({**COMMAND_R, "model_max_length": 131072}, {"logit_scale": 0.0625, "tied_head": True}),
    "Command R7B": (
        {
            **{
                **COMMAND_R,
                "model_type": "cohere2",
                "cache_implementation": "hybrid",
                "head_dim": 128,
                "layer_switch": 4,
            },
            **{"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"},
            **{"rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4, "use_embedding_sharing": True},
            **{"use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True},
        },
        {"windowed_layers": frozenset(layer for layer in range(40) if layer % 4 != 3)},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name):
    hf_config, expected = PUBLISHED[name]
    config, _ = architectures.translate(hf_config)
    assert {key: getattr(config, key) for key in expected} == expected


def test_ropes_of_published_models():
    def rope(name):
        return architectures.translate(PUBLISHED[name][0])[0].rope

    assert rope("Vicuna 7B 1.5 16k").scaling is RopeScaling.LINEAR and rope("CodeLlama 7B").theta == 1e6
    assert rope("DeepSeek-R1-Distill-Llama-8B").scaling is RopeScaling.LLAMA3
    assert [rope(name).dim for name in ("Pythia 70M", "GPT-NeoX 20B", "Phi 2", "Phi 4 mini")] == [16, 24, 32, 96]
    assert [rope(name).dim for name in ("StableLM 2 1.6B", "OPT 6.7B", "BLOOM 560M")] == [16, 0, 0]
    assert rope("Phi 3.5 mini").scaling is RopeScaling.LONGROPE and rope("Phi 3.5 mini").original_max_positions == 4096
    assert rope("Command R").interleaved and rope("Command R7B").interleaved
    gemma, smollm3, cohere2 = (
        architectures.translate(PUBLISHED[n][0])[0] for n in ("Gemma 3 1B", "SmolLM3 3B", "Command R7B")
    )
    assert [table.theta for table in gemma.ropes] == [1e4, 1e6] and gemma.rope_index(5) == 1
    assert [smollm3.rope_index(layer) for layer in range(4)] == [0, 0, 0, -1]
    assert [cohere2.rope_index(layer) for layer in range(4)] == [0, 0, 0, -1]
