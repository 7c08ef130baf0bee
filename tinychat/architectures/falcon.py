"""Falcon RW 1B, 7B, 11B, 40B, 180B: LayerNorm with bias, a plain MLP with GELU, mostly beside attention.

7B has one key-value head and one norm for both halves of a block, 40B and 180B some key-value heads and two norms, 11B
one norm, RW-1B the sequential block with ALiBi. ALiBi is added before the scores are divided by sqrt(head_dim), its
slopes are rounded to bf16; transformers also rounds each slope * distance to bf16, which is not done here.
"""

import math
from typing import Any

import numpy as np

from tinychat import alibi
from tinychat.architectures.config_reader import LARGEST_POSITION, ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Activation, Block, ModelConfig, Norm, Rope
from tinychat.qtensor import bfloat16

NAMES = TensorNames(
    embed="transformer.word_embeddings",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    qkv=("self_attention.query_key_value",),
    out=("self_attention.dense",),
    up=("mlp.dense_h_to_4h",),
    down=("mlp.dense_4h_to_h",),
    act_scale="mlp.act.scales",
    heads_interleaved=True,
)
TWO_NORMS = NAMES.renamed(norm1="ln_attn", norm2="ln_mlp")
ALSO = ("RefinedWeb", "RefinedWebModel")  # what the first files call 40B and 7B


def names(config: ModelConfig) -> TensorNames:
    """Norms that lie side by side have names of their own."""
    return TWO_NORMS if config.block is Block.PARALLEL else NAMES


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. The first files say n_head_kv where later ones have new_decoder_architecture."""
    reader.spelled(hidden_size="n_embed", num_attention_heads="n_head", num_hidden_layers="n_layer")
    reader.spelled(rms_norm_eps="layer_norm_epsilon", intermediate_size="ffn_hidden_size", num_kv_heads="n_head_kv")
    reader.refuse("apply_residual_connection_post_layernorm")
    reader.text("activation", "gelu", choices=("gelu",))
    hidden_size = reader.integer("hidden_size", high=2**17)
    n_heads = reader.integer("num_attention_heads", high=2**10)
    new = reader.flag("new_decoder_architecture", reader.get("n_head_kv", None) is not None)
    multi_query, parallel = reader.flag("multi_query", True), reader.flag("parallel_attn", True) or new
    n_kv_heads = reader.integer("num_kv_heads", n_heads, high=2**10)
    if not new:
        n_kv_heads = 1 if multi_query else n_heads
    if n_heads % n_kv_heads:
        raise reader.error("num_kv_heads", f"a divisor of num_attention_heads = {n_heads}")
    n_norms = reader.integer("num_ln_in_parallel_attn", 2 if new else 1, high=2)
    if n_norms == 2 and not new:
        raise reader.error("num_ln_in_parallel_attn", "1: two norms are those of the new decoder architecture")
    parallel_block = Block.PARALLEL if n_norms == 2 else Block.PARALLEL_ONE_NORM
    fields: dict[str, Any] = {}
    if reader.flag("alibi", False):
        reader.pass_over("rope_parameters", "rope_scaling", "rope_theta")
        rounded = np.array(alibi.filled_up(n_heads), np.float32).astype(bfloat16).astype(np.float32)
        fields = {"rope": Rope(dim=0), "slopes": tuple((rounded / math.sqrt(hidden_size // n_heads)).tolist())}
    return reader.decoder(
        n_kv_heads=n_kv_heads,
        tied=True,
        max_positions=reader.integer("max_position_embeddings", 2048, high=LARGEST_POSITION),
        intermediate_size=reader.integer("intermediate_size", 4 * hidden_size, high=2**20),
        activation=Activation.GELU,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        norm_eps=1e-5,
        block=parallel_block if parallel else Block.SEQUENTIAL,
        biases=("qkv", "out", "up", "down") if reader.flag("bias", False) else (),
        **fields,
    )
