"""StarCoder and SantaCoder: learned positions, one key-value head for all queries (or one each), GELU by tanh."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, Norm, Rope

NAMES = TensorNames(
    embed="transformer.wte",
    positions="transformer.wpe",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    norm1="ln_1",
    qkv=("attn.c_attn",),
    out=("attn.c_proj",),
    norm2="ln_2",
    up=("mlp.c_fc",),
    down=("mlp.c_proj",),
    act_scale="mlp.act.scales",
    heads_interleaved=True,
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    reader.spelled(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head")
    reader.spelled(max_position_embeddings="n_positions", intermediate_size="n_inner")
    reader.spelled(hidden_act="activation_function", rms_norm_eps="layer_norm_epsilon")
    reader.pass_over("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner")
    reader.pass_over("max_batch_size", "pad_key_length", "pre_allocate_kv_cache", "validate_runner_input")
    reader.pass_over(
        *(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj"))
    )
    return reader.decoder(
        n_kv_heads=1 if reader.flag("multi_query", True) else None,
        hidden_act="gelu_pytorch_tanh",
        tied=True,
        intermediate_size=reader.integer(
            "intermediate_size", 4 * reader.integer("hidden_size", high=2**17), high=2**20
        ),
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        rope=Rope(dim=0),
        position_offset=0,
        attention_scale=None if reader.flag("scale_attn_weights", True) else 1.0,
        biases=("qkv", "out", "up", "down"),
    )
