"""Round to nearest: the layer as it is, straight to the grid. The measure that every other method is held against."""

from __future__ import annotations

from tinychat.config import ModelConfig
from tinychat.decoder import PackedLayer
from tinychat.quantize.activations import Observed
from tinychat.quantize.grid import Grid
from tinychat.quantize.report import GroupResult

NEEDS_CALIBRATION = False


def transform(
    config: ModelConfig, layer: PackedLayer, index: int, observed: Observed | None, grid: Grid
) -> tuple[PackedLayer, list[GroupResult]]:
    """`layer` itself."""
    return layer, []
