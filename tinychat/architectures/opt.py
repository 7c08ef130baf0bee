"""OPT 125M to 66B, Galactica: learned positions from row 2 on; 350M norms sums and has narrow embeddings."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, Norm, Rope

NAMES = TensorNames(
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    project_in="model.decoder.project_in",
    project_out="model.decoder.project_out",
    norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}.",
    norm1="self_attn_layer_norm",
    out=("self_attn.out_proj",),
    norm2="final_layer_norm",
    up=("fc1",),
    down=("fc2",),
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(intermediate_size="ffn_dim", hidden_act="activation_function")
    reader.refuse("_remove_final_layer_norm", "scale_embeddings")
    reader.require("layer_norm_elementwise_affine", "learned_embeddings")
    hidden_size = reader.integer("hidden_size", high=2**17)
    width = reader.integer("word_embed_proj_dim", None, high=2**17)
    return reader.decoder(
        hidden_act="relu",
        tied=True,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        block=Block.SEQUENTIAL if reader.flag("do_layer_norm_before", True) else Block.POST_NORM,
        rope=Rope(dim=0),
        position_offset=2,
        embed_size=None if width == hidden_size else width,
        biases=("qkv", "out", "up", "down") if reader.flag("enable_bias", True) else (),
    )
