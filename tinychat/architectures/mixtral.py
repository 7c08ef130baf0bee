"""Mixtral 8x7B and 8x22B: Mistral with experts in every layer, of which the probabilities of those used sum to 1."""

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import Experts, ModelConfig

NAMES = TensorNames(
    router=("block_sparse_moe.gate",),
    expert_up=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    expert_down=("block_sparse_moe.experts.{}.w2",),
)


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    layers = frozenset(range(reader.n_layers()))
    window = reader.sliding_window(default=None)
    n_experts = reader.integer("num_local_experts", 8, high=2**12)
    experts = Experts(
        n_experts,
        reader.integer("num_experts_per_tok", 2, high=n_experts),
        reader.integer("intermediate_size", high=2**20),
        layers,
    )
    return reader.decoder(
        n_kv_heads=8,
        window=reader.every_layer(window),
        experts=experts,
        norm_eps=1e-5,
        theta=1e6,
    )
