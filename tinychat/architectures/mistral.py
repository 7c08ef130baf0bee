"""Mistral 7B, Nemo and Small, Zephyr: Llama with a window over all layers, which later models switch off by null."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    window = reader.sliding_window(default=4096)
    layers = frozenset(range(reader.n_layers())) if window else frozenset()
    return reader.decoder(n_kv_heads=8, window=(window, layers))
