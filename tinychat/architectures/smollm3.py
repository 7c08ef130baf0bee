"""SmolLM3: Llama in which every fourth layer knows no positions."""

from dataclasses import replace

from tinychat.architectures.config_reader import ConfigReader
from tinychat.architectures.names import TensorNames
from tinychat.config import ModelConfig, Rope

NAMES = TensorNames()


def translate(reader: ConfigReader) -> ModelConfig:
    """See `architectures.translate`."""
    n_layers, period = reader.n_layers(), reader.integer("no_rope_layer_interval", 4, high=2**10)
    turns = reader.get("no_rope_layers", [int((layer + 1) % period != 0) for layer in range(n_layers)])
    if not isinstance(turns, list) or len(turns) != n_layers or not all(turn in (0, 1) for turn in turns):
        raise reader.error("no_rope_layers", f"{n_layers} times 1, or 0 for a layer without rotary positions")
    window = reader.sliding_window(None)
    if not reader.flag("use_sliding_window", False):
        window = None
    reader.pass_over("max_window_layers")
    layers = reader.sliding_layers(lambda layer: bool(window) and not turns[layer])
    if layers and window is None:
        raise reader.error("layer_types", "full_attention only: use_sliding_window or sliding_window is off")
    attention = ("qkv", "out") if reader.flag("attention_bias", False) else ()
    mlp = ("up", "down") if reader.flag("mlp_bias", False) else ()
    config = reader.decoder(n_kv_heads=4, tied=True, theta=2e6, window=(window, layers), biases=attention + mlp)
    return replace(config, layer_ropes=tuple(config.rope if turn else Rope(dim=0) for turn in turns))
