"""Phi 1, 1.5 and 2: a share of each head rotated, attention beside the MLP on one norm, biases everywhere."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, Norm

NAMES = TensorNames(norm="model.final_layernorm", out=("self_attn.dense",), up=("mlp.fc1",), down=("mlp.fc2",))


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(rms_norm_eps="layer_norm_eps")
    reader.refuse("qk_layernorm")
    return reader.decoder(
        hidden_act="gelu_new",
        partial=0.5,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        block=Block.PARALLEL_ONE_NORM,
        biases=("qkv", "out", "up", "down", "head"),
    )
