"""OLMo 2: Llama with norms of what attention and MLP add, not of what they read, and of all queries and keys."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, QKNorm

NAMES = TensorNames(out_norm="post_attention_layernorm", down_norm="post_feedforward_layernorm")


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    return reader.decoder(
        norm_eps=1e-5,
        block=Block.NORM_AFTER,
        qk_norm=QKNorm.WHOLE,
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
