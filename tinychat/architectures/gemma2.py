"""Gemma 2: Gemma with norms around attention and MLP, capped scores and logits, a window in every other layer."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig

NAMES = TensorNames(
    out_norm="post_attention_layernorm",
    norm2="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
    norm_offset=1.0,
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(hidden_act="hidden_activation").pass_over("cache_implementation")
    reader.refuse("use_bidirectional_attention")
    window = reader.sliding_window(4096)
    return reader.decoder(
        n_kv_heads=4,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        tied=True,
        window=(window, reader.sliding_layers(lambda layer: layer % 2 == 0)),
        block=Block.SANDWICH,
        attention_scale=reader.number("query_pre_attn_scalar", 256.0, above=0, high=2**20) ** -0.5,
        attention_cap=reader.cap("attn_logit_softcapping", 50.0),
        logit_cap=reader.cap("final_logit_softcapping", 30.0),
        embed_scale=reader.integer("hidden_size", high=2**17) ** 0.5,
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
