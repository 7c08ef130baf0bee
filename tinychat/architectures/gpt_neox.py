"""GPT-NeoX 20B, Pythia, Dolly, StableCode alpha: a share of each head rotated, attention beside the MLP."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, Norm

NAMES = TensorNames(
    embed="gpt_neox.embed_in",
    norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layer="gpt_neox.layers.{}.",
    qkv=("attention.query_key_value",),
    out=("attention.dense",),
    up=("mlp.dense_h_to_4h",),
    down=("mlp.dense_4h_to_h",),
    act_scale="mlp.act.scales",
    heads_interleaved=True,
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(rms_norm_eps="layer_norm_eps", rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    return reader.decoder(
        hidden_act="gelu",
        partial=0.25,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        block=Block.PARALLEL if reader.flag("use_parallel_residual", True) else Block.SEQUENTIAL,
        biases=("up", "down", *(("qkv", "out") if reader.flag("attention_bias", True) else ())),
    )
