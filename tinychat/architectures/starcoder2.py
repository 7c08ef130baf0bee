"""StarCoder2: rotary, a window over all layers, biases, LayerNorm and a plain MLP with GELU by tanh."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, Norm

NAMES = TensorNames(up=("mlp.c_fc",), down=("mlp.c_proj",), act_scale="mlp.act.scales")


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(rms_norm_eps="norm_epsilon")
    reader.pass_over("mlp_type", "layer_norm_epsilon", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    reader.require("scale_attn_weights")
    reader.text("norm_type", "layer_norm", choices=("layer_norm",))
    return reader.decoder(
        n_kv_heads=2,
        hidden_act="gelu_pytorch_tanh",
        tied=True,
        window=reader.every_layer(reader.sliding_window(None)),
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        biases=("qkv", "out", "up", "down") if reader.flag("use_bias", True) else (),
    )
