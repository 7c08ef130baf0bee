"""Llama 1, 2 and 3, Vicuna, CodeLlama, Yi, SmolLM 1 and 2, DeepSeek-R1 distills: the plain decoder, perhaps biases."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    attention = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    mlp = ("up", "down") if reader.flag("mlp_bias", False) else ()
    return reader.decoder(biases=attention + mlp)
