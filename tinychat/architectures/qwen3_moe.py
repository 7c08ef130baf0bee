"""Qwen 3 with experts: 30B-A3B, 235B-A22B and their kin; a window, where it is switched on, is over all layers."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    biases = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    window = reader.sliding_window(4096) if reader.flag("use_sliding_window", False) else None
    for key in ("sliding_window", "max_window_layers"):  # without the flag, or never, looked at
        reader.get(key, None)
    return reader.decoder(
        n_kv_heads=4,
        head_dim=None,
        biases=biases,
        window=(window, frozenset(range(reader.n_layers())) if window else frozenset()),
        qk_norm=True,
        experts=reader.experts(n_used=8, normalized=False),
    )
