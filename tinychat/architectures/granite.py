"""Granite 3: Llama with multipliers of embeddings, scores, what is added, and logits."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""

    def multiplier(key: str) -> float:
        return reader.number(key, 1.0, above=0, high=1e6)

    attention = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    mlp = ("up", "down") if reader.flag("mlp_bias", False) else ()
    return reader.decoder(
        embed_scale=multiplier("embedding_multiplier"),
        attention_scale=multiplier("attention_multiplier"),
        residual_scale=multiplier("residual_multiplier"),
        logit_scale=1 / multiplier("logits_scaling"),
        biases=attention + mlp,
    )
