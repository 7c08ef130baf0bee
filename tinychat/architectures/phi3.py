"""Phi 3, 3.5 and 4, mini ones too: Llama with q, k, v and gate, up stored as one, perhaps long rope."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.refuse("attention_bias", "lm_head_bias", "mlp_bias")
    reader.pass_over("full_attn_mod", "interpolate_factor", "original_max_position_embeddings")
    window = reader.every_layer(reader.sliding_window(None))
    return reader.decoder(partial=1.0, norm_eps=1e-5, window=window)
