"""Round to nearest: every linear straight to the grid. The measure that every other method is held against."""

from __future__ import annotations

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import quantized_layer
from tinychat.quantize.grid import Grid
from tinychat.weights import Layer

NEEDS_CALIBRATION = False


def round_layer(
    config: ModelConfig, layer: PackedLayer, index: int, activations: Activations | None, grid: Grid
) -> Layer:
    """`layer` as it is written."""
    return quantized_layer(layer, grid)
