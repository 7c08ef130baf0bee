"""Qwen 1.5 MoE A2.7B and Qwen 2 57B-A14B: Qwen 2 with experts, a shared one beside them, plain MLPs in some layers."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    window = reader.windows()
    if window[0] and not reader.get("layer_types", None):  # versions of transformers differ in what is meant
        raise reader.error("layer_types", "full_attention or sliding_attention for each layer, where a window is on")
    shared = reader.integer("shared_expert_intermediate_size", 5632, high=2**20)
    return reader.decoder(
        n_kv_heads=16,
        biases=("qkv",) if reader.flag("qkv_bias", True) else (),
        window=window,
        experts=reader.experts(n_used=4, normalized=False, shared_size=shared),
    )
