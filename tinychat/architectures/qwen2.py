"""Qwen 1.5, 2 and 2.5, DeepSeek-R1 distills: Llama with biases on q, k and v, perhaps a window over some layers."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    return reader.decoder(n_kv_heads=32, biases=("qkv",), window=reader.windows())
