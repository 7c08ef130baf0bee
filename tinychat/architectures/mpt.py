"""MPT: LayerNorm, ALiBi, a plain MLP with GELU; no bias anywhere, the head tied. Keys are the family's own."""

from tinychat import alibi
from tinychat.architectures.config_reader import LARGEST_POSITION, ConfigReader
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
    hidden_size = reader.integer("d_model", 2048, high=2**17)
    n_heads = reader.integer("n_heads", 16, high=2**10)
    if hidden_size % n_heads:
        raise reader.error("d_model", f"a multiple of n_heads = {n_heads}")
    attention = reader.nested("attn_config")
    if not attention.flag("alibi", True):
        raise attention.error("alibi", "true: learned positions are not implemented")
    # as the models' own code has it; transformers' takes it for 8 whatever the file says
    bias_max = attention.number("alibi_bias_max", 8.0, above=0, high=1e3)
    attention.text("attn_type", "multihead_attention", choices=("multihead_attention",))
    for key in ("prefix_lm", "qk_ln", "attn_uses_sequence_id"):
        if attention.flag(key, False):
            raise attention.error(key, "false: it is not implemented")
    for key in ("clip_qkv", "softmax_scale"):
        if attention.get(key, None) is not None:
            raise attention.error(key, "null: it is not implemented")
    for key in ("attn_impl", "attn_pdrop", "dtype", "model_type"):  # change nothing
        attention.get(key, None)
    attention.finish()
    reader.flag("learned_pos_emb", True)  # those that ALiBi switches off
    if not reader.flag("no_bias", True):
        raise reader.error("no_bias", "true: MPT with biases is not implemented")
    if reader.get("logit_scale", None) is not None:
        raise reader.error("logit_scale", "null: it is not implemented")
    reader.text("norm_type", "low_precision_layernorm", choices=("low_precision_layernorm", "layernorm"))
    return ModelConfig(
        model_type=reader.text("model_type"),
        vocab_size=reader.integer("vocab_size", high=2**24),
        hidden_size=hidden_size,
        n_layers=reader.integer("n_layers", 24, high=2**10),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=hidden_size // n_heads,
        intermediate_size=reader.integer("expansion_ratio", 4, high=2**6) * hidden_size,
        max_positions=reader.integer("max_seq_len", 2048, high=LARGEST_POSITION),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, above=0, high=1),
        rope=Rope(dim=0),
        activation=Activation.GELU,
        norm=Norm.LAYER,
        slopes=alibi.every_second_first(n_heads, bias_max),
        tied_head=reader.flag("tie_word_embeddings", True),
        dtype=reader.dtype(),
    )
