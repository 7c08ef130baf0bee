"""Command R7B and A: Command R with a window in three of four layers; the fourth sees all, and knows no positions."""

from dataclasses import replace

from tinychat.architectures import cohere
from tinychat.architectures.config_reader import ConfigReader
from tinychat.config import ModelConfig, Rope

NAMES = cohere.NAMES


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`. The first files say in keys of their own what all of these models are."""
    reader.spelled(sliding_window_pattern="_sliding_window_pattern").pass_over("cache_implementation")
    reader.require("use_embedding_sharing", "use_gated_activation", "use_parallel_block", "use_parallel_embedding")
    reader.text("position_embedding_type", "rope_gptj", choices=("rope_gptj",))
    reader.text("order_of_interleaved_layers", "local_attn_first", choices=("local_attn_first",))
    if reader.number("rotary_pct", 1.0, above=0, high=1) != 1:
        raise reader.error("rotary_pct", "1: all of a head turns")
    window, period = reader.sliding_window(4096), reader.integer("layer_switch", 4, high=2**10)
    period = reader.integer("sliding_window_pattern", period, high=2**10)
    near = reader.sliding_layers(lambda layer: (layer + 1) % period != 0)
    config = cohere.translate(reader, theta=10000.0)
    ropes = tuple(config.rope if layer in near else Rope(dim=0) for layer in range(config.n_layers))
    return replace(config, sliding_window=window, windowed_layers=near, layer_ropes=ropes)
