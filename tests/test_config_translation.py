"""config.json to ModelConfig: configs as they lie on the hub, both spellings, and what is refused and how."""

import copy
import json

import pytest
from transformers import AutoConfig

from tinychat import architectures
from tinychat.config import Activation, Block, ModelConfig, Norm, QKNorm, Rope, RopeScaling
from tinychat.errors import ConfigError

COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "transformers_version": "4.43.0",
    "use_cache": True,
}
LLAMA_2_7B = {
    **COMMON,
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LLAMA_3_1_8B = {
    **LLAMA_2_7B,
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMOLLM2_135M = {
    **LLAMA_2_7B,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"dtype": "q4"},
    "vocab_size": 49152,
}
MISTRAL_7B = {
    **COMMON,
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN2_5_7B = {
    **COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B = {
    **COMMON,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MPT_7B = {
    "architectures": ["MPTForCausalLM"],
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
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"init_gain": 0, "name": "kaiming_normal_", "verbose": 0},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
FALCON_7B = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
FALCON_40B = {
    **FALCON_7B,
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
}
OTHER_KEYS = [MPT_7B, FALCON_7B, FALCON_40B]
HUB = [LLAMA_2_7B, LLAMA_3_1_8B, SMOLLM2_135M, MISTRAL_7B, QWEN2_5_7B, QWEN3_0_6B]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def translate(base: dict, ignore=(), **change) -> ModelConfig:
    """The config `base` with changes; a key changed to `...` is absent."""
    values = {key: value for key, value in {**copy.deepcopy(base), **change}.items() if value is not ...}
    return architectures.translate(values, ignore)[0]


def refusal(base: dict, **change) -> str:
    with pytest.raises(ConfigError) as caught:
        translate(base, **change)
    return str(caught.value)


def renamed(config: dict) -> dict:
    """The spelling of transformers 5."""
    config = dict(config)
    scaling = dict(config.pop("rope_scaling", None) or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    config["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": config.pop("rope_theta", 10000.0)}
    config["dtype"] = config.pop("torch_dtype")
    return config


def test_llama():
    config = translate(LLAMA_3_1_8B)
    assert config == ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_positions=131072,
        norm_eps=1e-5,
        rope=Rope(500000.0, 128, RopeScaling.LLAMA3, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0),
        dtype="bfloat16",
    )
    assert translate(LLAMA_2_7B).rope == Rope(10000.0, 128)
    assert translate(LLAMA_2_7B, num_key_value_heads=...).n_kv_heads == 32
    assert translate(SMOLLM2_135M).tied_head
    assert translate(LLAMA_2_7B, attention_bias=True).biases == {"qkv", "out"}
    assert translate(LLAMA_2_7B, mlp_bias=True).biases == {"up", "down"}


def test_mistral():
    config = translate(MISTRAL_7B)
    assert config.sliding_window == 4096 and config.windowed_layers == set(range(32)) and config.window(31) == 4096
    assert translate(MISTRAL_7B, sliding_window=...) == config  # transformers' default
    without = translate(MISTRAL_7B, sliding_window=None)
    assert without.sliding_window is None and not without.windowed_layers and without.window(0) == 0


def test_qwen2():
    config = translate(QWEN2_5_7B)
    assert config.biases == {"qkv"} and config.sliding_window is None and not config.windowed_layers
    assert config.head_dim == 128 and config.rope == Rope(1000000.0, 128)
    windowed = translate(QWEN2_5_7B, use_sliding_window=True, max_window_layers=21)
    assert windowed.sliding_window == 131072 and windowed.windowed_layers == set(range(21, 28))
    kinds = ["full_attention", "sliding_attention"] * 14
    assert translate(QWEN2_5_7B, use_sliding_window=True, layer_types=kinds).windowed_layers == set(range(1, 28, 2))
    assert translate(QWEN2_5_7B, layer_types=["full_attention"] * 28) == config
    stretched = translate(QWEN2_5_7B, rope_scaling=YARN, max_position_embeddings=131072)
    assert stretched.rope == Rope(1000000.0, 128, RopeScaling.YARN, 4.0, 32768)


def test_qwen3():
    config = translate(QWEN3_0_6B)
    assert config.qk_norm is QKNorm.HEAD and config.head_dim == 128 and config.n_heads * config.head_dim == 2048
    assert translate(QWEN3_0_6B, head_dim=...).head_dim == 128
    assert translate(QWEN3_0_6B, attention_bias=True).biases == {"qkv", "out"}


def test_mpt():
    config = translate(MPT_7B)
    assert config == ModelConfig(
        model_type="mpt",
        vocab_size=50432,
        hidden_size=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        intermediate_size=16384,
        max_positions=2048,
        norm_eps=1e-5,
        rope=Rope(dim=0),
        activation=Activation.GELU,
        gated=False,
        norm=Norm.LAYER,
        slopes=tuple(2.0 ** (-i / 4) for i in range(1, 33)),
        tied_head=True,
        dtype="bfloat16",
    )
    half = translate(MPT_7B, attn_config={**MPT_7B["attn_config"], "alibi_bias_max": 4})
    assert half.slopes == tuple(2.0 ** (-i / 8) for i in range(1, 33))


def test_falcon():
    config = translate(FALCON_7B)
    assert config == ModelConfig(
        model_type="falcon",
        vocab_size=65024,
        hidden_size=4544,
        n_layers=32,
        n_heads=71,
        n_kv_heads=1,
        head_dim=64,
        intermediate_size=18176,
        max_positions=2048,
        norm_eps=1e-5,
        rope=Rope(dim=64),
        activation=Activation.GELU,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        block=Block.PARALLEL_ONE_NORM,
        tied_head=True,
        dtype="bfloat16",
    )
    older = {"n_embed": 4544, "n_head": 71, "n_layer": 32}
    absent = dict.fromkeys(("hidden_size", "num_attention_heads", "num_hidden_layers"), ...)
    assert translate(FALCON_7B, **absent, **older) == config
    large = translate(FALCON_40B)
    assert (large.n_kv_heads, large.block) == (8, Block.PARALLEL)
    assert translate(FALCON_40B, num_ln_in_parallel_attn=1).block is Block.PARALLEL_ONE_NORM
    small = translate(FALCON_7B, alibi=True, multi_query=False, parallel_attn=False, num_attention_heads=71)
    assert (small.n_kv_heads, small.block, small.rope.dim) == (71, Block.SEQUENTIAL, 0)
    # 64 slopes of a power of two, then every second of the next: BLOOM's rule, rounded to bf16, over sqrt(64)
    expected = [2 ** (-i / 8) / 8 for i in range(1, 65)] + [2 ** (-i / 16) / 8 for i in range(1, 15, 2)]
    assert small.slopes == pytest.approx(expected, rel=2**-8)


@pytest.mark.parametrize("base", HUB, ids=lambda base: base["model_type"])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {**YARN, "beta_fast": 24, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
        {**YARN, "attention_factor": 1.5, "factor": None},
        LLAMA_3_1_8B["rope_scaling"],
    ],
    ids=lambda scaling: str(scaling and (scaling.get("type") or scaling["rope_type"])),
)
def test_both_spellings_are_one_config(base, scaling):
    older = {**base, "rope_scaling": scaling}
    assert translate(older) == translate(renamed(older))
    if scaling and "type" in scaling:
        assert translate(older) == translate(base, rope_scaling={**scaling, "rope_type": scaling["type"]})


@pytest.mark.parametrize("model_type", architectures.supported())
def test_what_transformers_writes_is_read(model_type):
    theirs = AutoConfig.for_model(model_type)
    config = translate(theirs.to_dict())
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (config.vocab_size, config.head_dim) == (theirs.vocab_size, head_dim)
    assert (config.sliding_window or None) == (getattr(theirs, "sliding_window", None) or None)
    assert translate(json.loads(theirs.to_json_string())) == config  # as save_pretrained writes it
    # and its defaults are ours, where the file leaves a key out
    minimal = dict.fromkeys(("attention_bias", "hidden_act", "head_dim", "rms_norm_eps", "tie_word_embeddings"), ...)
    more = dict.fromkeys(("num_key_value_heads", "sliding_window", "use_sliding_window", "rope_parameters"), ...)
    rest = dict.fromkeys(("max_window_layers", "layer_types", "mlp_bias"), ...)
    assert translate(theirs.to_dict(), **minimal, **more, **rest) == config


def test_newer_spelling_wins_where_transformers_says_so():
    both = translate(LLAMA_2_7B, rope_theta=1e6, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert both.rope.theta == 5e5
    assert translate(LLAMA_2_7B, torch_dtype="float32", dtype="bfloat16").dtype == "bfloat16"
    older = {"type": "linear", "factor": 2.0}
    same = translate(LLAMA_2_7B, rope_scaling=older, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert same.rope.scaling is RopeScaling.LINEAR
    message = refusal(LLAMA_2_7B, rope_scaling=older, rope_parameters={"rope_type": "linear", "factor": 4.0})
    assert "rope_scaling" in message and "rope_parameters" in message


def test_context_before_stretching():
    llama3 = {**LLAMA_3_1_8B["rope_scaling"]}
    del llama3["original_max_position_embeddings"]
    assert translate(LLAMA_3_1_8B, rope_scaling=llama3).rope.original_max_positions == 131072
    outside = translate(LLAMA_3_1_8B, original_max_position_embeddings=1024)
    assert outside.rope.original_max_positions == 1024  # transformers prefers it to the one within
    dynamic = translate(LLAMA_2_7B, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert dynamic.rope.original_max_positions == 4096


def test_unknown_model_type_lists_the_supported():
    message = refusal(LLAMA_2_7B, model_type="mamba2")
    assert "'mamba2'" in message
    assert all(family in message for family in ("llama", "mistral", "qwen2", "qwen3"))
    for helper in ("names", "config_reader", "../llama", "llama.", ""):
        assert "not supported" in refusal(LLAMA_2_7B, model_type=helper)
    assert "model_type" in refusal(LLAMA_2_7B, model_type=...)
    assert "model_type" in refusal(LLAMA_2_7B, model_type=["llama"])


def test_unknown_keys_are_refused_by_name_and_passed_by_ignore():
    message = refusal(LLAMA_2_7B, attn_logit_softcapping=50.0, use_parallel_residual=True)
    assert "attn_logit_softcapping = 50.0" in message and "use_parallel_residual = true" in message
    assert "--ignore-config attn_logit_softcapping" in message
    assert "rope_scaling" in message  # what is implemented is listed
    passed = translate(LLAMA_2_7B, ["attn_logit_softcapping"], attn_logit_softcapping=50.0)
    assert passed == translate(LLAMA_2_7B)
    message = refusal(QWEN2_5_7B, rope_scaling={**YARN, "mrope_section": [16, 24, 24]})
    assert "--ignore-config rope_scaling.mrope_section" in message
    ignored = ["rope_scaling.mrope_section"]
    stretched = translate(QWEN2_5_7B, ignored, rope_scaling={**YARN, "mrope_section": [16, 24, 24]})
    assert stretched.rope.scaling is RopeScaling.YARN
    assert "sliding_window" in refusal(LLAMA_2_7B, sliding_window=4096)  # not Llama's


def test_code_is_not_followed_and_bookkeeping_is_harmless():
    extra = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "trust_remote_code": True,
        "_attn_implementation_internal": "evil/kernel",
        "quantization_config": {"quant_method": "awq"},
        "pretraining_tp": 2,
        "unsloth_version": "2024.9",
    }
    assert translate(LLAMA_2_7B, **extra) == translate(LLAMA_2_7B)


def test_what_hub_configs_carry_besides():
    """Seen in published configs: what trainers, converters and older transformers leave behind."""
    trained = {"unsloth_fixed": True, "model_name": "unsloth/Llama-3.2-1B", "max_new_tokens": 2048}
    older = {"_flash_attn_2_enabled": True, "_from_model_config": True, "max_sequence_length": 2048, "pruned_heads": {}}
    assert translate(LLAMA_3_1_8B, **trained, **older, model_max_length=4096) == translate(LLAMA_3_1_8B)
    assert translate(QWEN2_5_7B, seq_length=32768) == translate(QWEN2_5_7B)  # Qwen 1.5


def test_null_is_as_good_as_absent():
    unset = dict.fromkeys(("sliding_window", "layer_types", "head_dim", "attn_logit_softcapping", "attention_bias"))
    assert translate(LLAMA_3_1_8B, **unset, rope_scaling=None) == translate(LLAMA_3_1_8B, rope_scaling=...)
    scaling = {**LLAMA_3_1_8B["rope_scaling"], "attn_factor": None}
    assert translate(LLAMA_3_1_8B, rope_scaling=scaling) == translate(LLAMA_3_1_8B)
    message = refusal(LLAMA_3_1_8B, sliding_window=None, attn_logit_softcapping=50.0)
    assert "attn_logit_softcapping = 50.0" in message and "sliding_window" not in message


def test_a_key_is_harmless_only_at_the_value_that_switches_it_off():
    assert "use_mrope = true" in refusal(QWEN2_5_7B, use_mrope=True)
    assert "rope_interleaved" in refusal(SMOLLM2_135M, rope_interleaved=True)
    assert "partial_rotary_factor" in refusal(LLAMA_2_7B, partial_rotary_factor=0.5)
    assert "pruned_heads" in refusal(LLAMA_2_7B, pruned_heads={"0": [1]})
    assert translate(LLAMA_2_7B, partial_rotary_factor=1.0) == translate(LLAMA_2_7B)


MPT_REFUSED = {
    "alibi": False,
    "attn_type": "multiquery_attention",
    "clip_qkv": 0.0,
    "prefix_lm": True,
    "qk_ln": True,
    "rope": True,
    "softmax_scale": -0.1,
}
REFUSED = [
    (LLAMA_2_7B, "hidden_act", "quick_gelu"),
    (LLAMA_2_7B, "hidden_size", ...),
    (LLAMA_2_7B, "hidden_size", None),
    (LLAMA_2_7B, "hidden_size", -1),
    (LLAMA_2_7B, "hidden_size", 4096.0),
    (LLAMA_2_7B, "hidden_size", "4096"),
    (LLAMA_2_7B, "hidden_size", 4100),
    (LLAMA_2_7B, "vocab_size", 0),
    (LLAMA_2_7B, "vocab_size", True),
    (LLAMA_2_7B, "num_hidden_layers", 10**9),
    (LLAMA_2_7B, "num_attention_heads", 0),
    (LLAMA_2_7B, "num_attention_heads", ...),
    (LLAMA_2_7B, "intermediate_size", [11008]),
    (LLAMA_2_7B, "max_position_embeddings", 10**30),
    (LLAMA_2_7B, "head_dim", 7),
    (LLAMA_2_7B, "head_dim", 2),
    (LLAMA_2_7B, "rms_norm_eps", float("nan")),
    (LLAMA_2_7B, "rms_norm_eps", 0),
    (LLAMA_2_7B, "rms_norm_eps", -1e-5),
    (LLAMA_2_7B, "rope_theta", float("nan")),
    (LLAMA_2_7B, "rope_theta", float("inf")),
    (LLAMA_2_7B, "rope_theta", "10000"),
    (LLAMA_2_7B, "rope_theta", True),
    (LLAMA_2_7B, "rope_theta", 10**400),
    (LLAMA_2_7B, "rope_scaling", "linear"),
    (LLAMA_2_7B, "rope_scaling", {"type": "longrope", "factor": 2.0}),
    (LLAMA_2_7B, "rope_scaling", {"type": "linear"}),
    (LLAMA_2_7B, "rope_scaling", {"type": "linear", "factor": -1.0}),
    (LLAMA_2_7B, "rope_scaling", {"type": "linear", "factor": 2.0, "finetuned": True}),
    (LLAMA_2_7B, "rope_scaling", {"type": "yarn"}),
    (LLAMA_2_7B, "rope_scaling", {**YARN, "beta_fast": 1, "beta_slow": 2}),
    (LLAMA_2_7B, "rope_scaling", {**YARN, "truncate": 1}),
    (LLAMA_2_7B, "rope_scaling", {**YARN, "attention_factor": -1.0}),
    (LLAMA_2_7B, "rope_scaling", {**YARN, "original_max_position_embeddings": 0}),
    (LLAMA_2_7B, "rope_scaling", {"type": "llama3", "factor": 8.0}),
    (LLAMA_3_1_8B, "rope_scaling", {**LLAMA_3_1_8B["rope_scaling"], "high_freq_factor": 1.0}),
    (LLAMA_2_7B, "rope_parameters", {"rope_type": ["default"]}),
    (LLAMA_2_7B, "rope_parameters", {"full_attention": {"rope_theta": 10000.0}}),
    (LLAMA_2_7B, "torch_dtype", "float8_e4m3fn"),
    (LLAMA_2_7B, "tie_word_embeddings", "yes"),
    (LLAMA_2_7B, "attention_bias", 1),
    (LLAMA_3_1_8B, "num_key_value_heads", 5),
    (MISTRAL_7B, "sliding_window", 0),
    (MISTRAL_7B, "layer_types", ["full_attention"] * 32),
    (QWEN2_5_7B, "layer_types", ["full_attention"] * 27),
    (QWEN2_5_7B, "layer_types", ["chunked_attention"] * 28),
    (QWEN2_5_7B, "layer_types", [{}] * 28),
    (QWEN2_5_7B, "layer_types", ["sliding_attention"] * 28),  # while use_sliding_window is off
    (QWEN2_5_7B, "max_window_layers", -1),
    (QWEN2_5_7B, "use_sliding_window", "no"),
    *((MPT_7B, "attn_config", {**MPT_7B["attn_config"], key: value}) for key, value in MPT_REFUSED.items()),
    (MPT_7B, "no_bias", False),
    (MPT_7B, "logit_scale", "inv_sqrt_d_model"),
    (MPT_7B, "norm_type", "rmsnorm"),
    (MPT_7B, "d_model", 4100),
    (FALCON_7B, "activation", "relu"),
    (FALCON_7B, "hidden_size", 4545),
    (FALCON_7B, "num_ln_in_parallel_attn", 2),
    (FALCON_7B, "apply_residual_connection_post_layernorm", True),
    (FALCON_40B, "num_kv_heads", 7),
]


@pytest.mark.parametrize(("base", "key", "value"), REFUSED, ids=[f"{k}-{i}" for i, (_, k, _) in enumerate(REFUSED)])
def test_impossible_values_are_refused_by_name(base, key, value):
    message = refusal(base, **{key: value})
    inner = {"num_key_value_heads": "num_attention_heads", "head_dim": "heads"}.get(key, key)
    assert key in message or inner in message
    assert "\n" not in message and len(message) < 1500


@pytest.mark.parametrize("base", HUB + OTHER_KEYS, ids=lambda base: base["model_type"])
def test_no_value_of_any_key_ends_in_another_exception(base):
    """Any JSON value in any place: a config or a ConfigError."""
    odd = [None, True, 0, -1, 7, 1.5, float("nan"), float("inf"), 10**30, "", "x", [], [1], {}, {"type": 3}, {"a": {}}]
    for key in [*base, "rope_parameters", "layer_types", "head_dim", "dtype", "model_type"]:
        for value in odd:
            try:
                translate(base, **{key: value})
            except ConfigError as error:
                assert str(error).startswith("config.json")


def test_not_an_object():
    for value in (None, [], "llama", 3):
        with pytest.raises(ConfigError, match="not an object"):
            architectures.translate(value)
