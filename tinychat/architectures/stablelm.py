"""StableLM 3B, 2 and Zephyr, Stable Code 3B: Llama with LayerNorm and a share of each head rotated."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Block, ModelConfig, Norm

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(rms_norm_eps="layer_norm_eps", partial_rotary_factor="rope_pct")
    reader.refuse("qk_layernorm")
    return reader.decoder(
        partial=0.25,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        block=Block.PARALLEL_ONE_NORM if reader.flag("use_parallel_residual", False) else Block.SEQUENTIAL,
        biases=("qkv",) if reader.flag("use_qkv_bias", False) else (),
    )
