"""Llama 1, 2 and 3: the plain decoder; biases only where the config asks for them."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    attention = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    mlp = ("up", "down") if reader.flag("mlp_bias", False) else ()
    return reader.decoder(biases=attention + mlp)
