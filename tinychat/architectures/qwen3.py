"""Qwen 3: heads of their own size, with a norm on each head of q and k; no bias unless the config asks for it."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, QKNorm

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    biases = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    return reader.decoder(n_kv_heads=32, head_dim=128, biases=biases, window=reader.windows(), qk_norm=QKNorm.HEAD)
