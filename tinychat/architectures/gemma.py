"""Gemma 1 and CodeGemma: norms counted from 1, gated GELU by tanh, embeddings times sqrt(hidden_size), a tied head."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Activation, ModelConfig

NAMES = TensorNames(norm_offset=1.0)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. "gelu" is what older files say, and the one by tanh is meant."""
    for key in ("hidden_act", "hidden_activation"):
        reader.text(key, None, choices=("gelu", "gelu_pytorch_tanh"))
    reader.refuse("use_bidirectional_attention")
    return reader.decoder(
        n_kv_heads=16,
        head_dim=256,
        tied=True,
        activation=Activation.GELU_TANH,
        embed_scale=reader.integer("hidden_size", high=2**17) ** 0.5,
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
