"""Gemma 3 270M and 1B: Gemma 2 with norms of queries and keys instead of caps, and two rotary bases."""

from tinychat.architectures import gemma2
from tinychat.architectures.config_reader import ConfigReader
from tinychat.config import Block, ModelConfig, QKNorm

NAMES = gemma2.NAMES


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. A window in five of six layers, which have a rope of their own."""
    reader.spelled(hidden_act="hidden_activation", sliding_window_pattern="_sliding_window_pattern")
    reader.pass_over("cache_implementation")
    reader.refuse("use_bidirectional_attention")
    if reader.cap("attn_logit_softcapping", None) is not None:
        raise reader.error("attn_logit_softcapping", "null: these models were trained without it")
    window, period = reader.sliding_window(4096), reader.integer("sliding_window_pattern", 6, high=2**10)
    local = reader.sliding_layers(lambda layer: (layer + 1) % period != 0)
    head_dim = reader.integer("head_dim", 256, low=4, high=2**10)
    everywhere, near = reader.two_ropes(head_dim, theta=1e6, local_theta=1e4)
    return reader.decoder(
        n_kv_heads=4,
        head_dim=head_dim,
        hidden_act="gelu_pytorch_tanh",
        tied=True,
        window=(window, local),
        rope=everywhere,
        layer_ropes=tuple(near if layer in local else everywhere for layer in range(reader.n_layers())),
        block=Block.SANDWICH,
        qk_norm=QKNorm.HEAD,
        attention_scale=reader.number("query_pre_attn_scalar", 256.0, above=0, high=2**20) ** -0.5,
        logit_cap=reader.cap("final_logit_softcapping", None),
        embed_scale=reader.integer("hidden_size", high=2**17) ** 0.5,
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
