"""Falcon: LayerNorm with bias, a plain MLP with GELU, mostly beside attention instead of after it.

7B has one key-value head and one norm for both halves of a block, 40B and 180B some key-value heads and two norms, 11B
one norm, RW-1B the sequential block with ALiBi. ALiBi is added before the scores are divided by sqrt(head_dim), its
slopes are rounded to bf16; transformers also rounds each slope * distance to bf16, which is not done here.
"""

import math

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
    heads_interleaved=True,
)
TWO_NORMS = NAMES.renamed(norm1="ln_attn", norm2="ln_mlp")


def names(config: ModelConfig) -> TensorNames:
    """Norms that lie side by side have names of their own."""
    return TWO_NORMS if config.block is Block.PARALLEL else NAMES


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. Older files say n_embed, n_head and n_layer."""
    hidden_size = reader.integer("hidden_size", reader.integer("n_embed", 4544, high=2**17), high=2**17)
    n_heads = reader.integer("num_attention_heads", reader.integer("n_head", 71, high=2**10), high=2**10)
    n_layers = reader.integer("num_hidden_layers", reader.integer("n_layer", 32, high=2**10), high=2**10)
    if hidden_size % n_heads or hidden_size // n_heads % 2:
        raise reader.error("hidden_size", f"an even multiple of num_attention_heads = {n_heads}")
    head_dim = hidden_size // n_heads
    new = reader.flag("new_decoder_architecture", False)
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
    reader.refuse("apply_residual_connection_post_layernorm")
    reader.text("activation", "gelu", choices=("gelu",))
    max_positions = reader.integer("max_position_embeddings", 2048, high=LARGEST_POSITION)
    rope, slopes = reader.rope(head_dim, max_positions), ()
    if reader.flag("alibi", False):
        rounded = np.array(alibi.filled_up(n_heads), np.float32).astype(bfloat16).astype(np.float32)
        rope, slopes = Rope(dim=0), tuple((rounded / math.sqrt(head_dim)).tolist())
    return ModelConfig(
        model_type=reader.text("model_type"),
        vocab_size=reader.integer("vocab_size", high=2**24),
        hidden_size=hidden_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.integer("ffn_hidden_size", 4 * hidden_size, high=2**20),
        max_positions=max_positions,
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, above=0, high=1),
        rope=rope,
        activation=Activation.GELU,
        gated=False,
        norm=Norm.LAYER,
        norm_bias=True,
        block=parallel_block if parallel else Block.SEQUENTIAL,
        slopes=slopes,
        biases=frozenset(("qkv", "out", "up", "down") if reader.flag("bias", False) else ()),
        tied_head=reader.flag("tie_word_embeddings", True),
        dtype=reader.dtype(),
    )
