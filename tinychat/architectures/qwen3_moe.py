"""Qwen 3 MoE, 30B-A3B and 235B-A22B: Qwen 3 with experts; a window, where it is switched on, is over all layers."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, QKNorm

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    biases = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    window = reader.sliding_window(4096) if reader.flag("use_sliding_window", False) else None
    reader.pass_over("sliding_window", "max_window_layers")  # without the flag, or never, looked at
    return reader.decoder(
        n_kv_heads=4,
        head_dim=None,
        biases=biases,
        window=reader.every_layer(window),
        qk_norm=QKNorm.HEAD,
        experts=reader.experts(n_used=8, normalized=False),
    )
