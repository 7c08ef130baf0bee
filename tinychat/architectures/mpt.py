"""MPT 7B and 30B: LayerNorm, ALiBi, a plain MLP with GELU; no bias anywhere."""

from tinychat import alibi
from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Activation, ModelConfig, Norm, Rope

NAMES = TensorNames(
    embed="transformer.wte",
    norm="transformer.norm_f",
    layer="transformer.blocks.{}.",
    norm1="norm_1",
    qkv=("attn.Wqkv",),
    out=("attn.out_proj",),
    norm2="norm_2",
    up=("ffn.up_proj",),
    down=("ffn.down_proj",),
    act_scale="ffn.act.scales",
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(hidden_size="d_model", num_attention_heads="n_heads", num_hidden_layers="n_layers")
    reader.spelled(max_position_embeddings="max_seq_len", rms_norm_eps="layer_norm_epsilon")
    attention = reader.nested("attn_config")
    attention.require("alibi")
    # as the models' own code has it; transformers' takes it for 8 whatever the file says
    bias_max = attention.number("alibi_bias_max", 8.0, above=0, high=1e3)
    attention.text("attn_type", "multihead_attention", choices=("multihead_attention",))
    attention.refuse("prefix_lm", "qk_ln", "attn_uses_sequence_id")
    clip = attention.number("clip_qkv", None, above=0, high=1e6)
    scale = attention.number("softmax_scale", None, above=0, high=1e3)
    attention.pass_over("attn_impl", "dtype", "model_type")
    attention.finish()
    reader.flag("learned_pos_emb", True)  # those that ALiBi switches off
    reader.require("no_bias")
    if reader.get("logit_scale", None) is not None:
        raise reader.error("logit_scale", "null: it is not implemented")
    reader.text("norm_type", "low_precision_layernorm", choices=("low_precision_layernorm", "layernorm"))
    hidden_size = reader.integer("hidden_size", high=2**17)
    return reader.decoder(
        norm_eps=1e-5,
        tied=True,
        intermediate_size=reader.integer("expansion_ratio", 4, high=2**6) * hidden_size,
        rope=Rope(dim=0),
        slopes=alibi.every_second_first(reader.integer("num_attention_heads", high=2**10), bias_max),
        activation=Activation.GELU,
        gated=False,
        norm=Norm.LAYER,
        clip_qkv=clip,
        attention_scale=scale,
    )
