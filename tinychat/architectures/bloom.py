"""BLOOM and BLOOMZ: ALiBi, a norm of the embedding, heads kept together in files, a plain MLP with GELU by tanh."""

from tinychat import alibi
from tinychat.architectures.config_reader import LARGEST_POSITION, ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Activation, ModelConfig, Norm, Rope

NAMES = TensorNames(
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    qkv=("self_attention.query_key_value",),
    out=("self_attention.dense",),
    up=("mlp.dense_h_to_4h",),
    down=("mlp.dense_4h_to_h",),
    heads_interleaved=True,
    act_scale="mlp.gelu_impl.scales",
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. `seq_length`, the context of the training, is in older files only."""
    reader.spelled(hidden_size="n_embed", num_hidden_layers="n_layer", num_attention_heads="n_head")
    reader.spelled(rms_norm_eps="layer_norm_epsilon")
    reader.refuse("apply_residual_connection_post_layernorm")
    reader.pass_over("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "offset_alibi")
    reader.pass_over("skip_bias_add", "skip_bias_add_qkv", "slow_but_exact", "unk_token_id", "use_pretrained_torch")
    return reader.decoder(
        tied=True,
        max_positions=reader.integer("seq_length", 2048, high=LARGEST_POSITION),
        intermediate_size=4 * reader.integer("hidden_size", high=2**17),
        activation=Activation.GELU_TANH,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        embed_norm=True,
        rope=Rope(dim=0),
        slopes=alibi.filled_up(reader.integer("num_attention_heads", high=2**10)),
        biases=("qkv", "out", "up", "down"),
    )
