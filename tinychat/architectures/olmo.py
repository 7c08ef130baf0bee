"""OLMo 1B and 7B: Llama with LayerNorms that have no weight, queries, keys and values perhaps clipped."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, Norm

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    return reader.decoder(
        norm=Norm.LAYER,
        norm_weight=False,
        norm_eps=1e-5,
        clip_qkv=reader.number("clip_qkv", None, above=0, high=1e6),
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
