"""Command R, Aya 23: attention beside the MLP on one norm without bias, rotary pairs side by side, logits scaled."""

from dataclasses import replace

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, Norm

NAMES = TensorNames()


def translate(reader: ConfigReader, theta: float = 500000.0) -> ModelConfig:
    """See `architectures.translate`; `theta` is the default of the rotary base."""
    reader.spelled(rms_norm_eps="layer_norm_eps")
    reader.refuse("use_qk_norm")
    config = reader.decoder(
        norm_eps=1e-5,
        tied=True,
        theta=theta,
        norm=Norm.LAYER,
        block=Block.PARALLEL_ONE_NORM,
        logit_scale=reader.number("logit_scale", 0.0625, above=0, high=1e6),
        biases=("qkv", "out") if reader.flag("attention_bias", False) else (),
    )
    return replace(config, rope=replace(config.rope, interleaved=True))
