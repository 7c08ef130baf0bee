"""Round to nearest: every linear straight to the grid. The measure that every other method is held against."""

from __future__ import annotations

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.quantize.activations import Observed
from tinychat.quantize.dense import quantized_layer
from tinychat.quantize.grid import Grid
from tinychat.quantize.report import GroupResult
from tinychat.weights import Layer

NEEDS_CALIBRATION = False
NEEDS_GRAMS = False


def round_layer(
    config: ModelConfig,
    layer: PackedLayer,
    index: int,
    observed: Observed | None,
    grid: Grid,
    act_order: str | None = None,
) -> tuple[Layer, list[GroupResult]]:
    """`layer` as it is written, within the limits that clipping may have found. There is nothing to say of it."""
    return quantized_layer(layer, lambda part: part.quantize(grid)), []
