"""A model rounded to nearest while a backend packs it: what calibration text is sampled from.

A layer is rounded when it is asked for, a few rows at a time, so that nobody ever holds the float model: the peak is
the packed 4-bit model and the mapped pages of one layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tinychat.qtensor import Weight
from tinychat.quantize.grid import Grid, as_float, stacked
from tinychat.weights import QUANTIZED, Layer, Linear, Wrapped

GRID = Grid(bits=4, group_size=32)  # 4.6 bits a weight; this text need not be cheap to the last bit
_ROWS = 1024


class Rounded(Wrapped):
    """`source` with its linears in 4 bits. The embedding and the head stay as they are."""

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        layer = self.source.layer(index)
        found = {name: getattr(layer, name) for name in QUANTIZED}
        rounded = {name: _rounded(linear, f"layer {index}, {name}") for name, linear in found.items() if linear}
        return replace(layer, **rounded)  # type: ignore[arg-type]  # QUANTIZED are linears of it


def _rounded(linear: Linear, name: str) -> Linear:
    return Linear(tuple(_segment(segment, name) for segment in linear.segments), linear.bias)


def _segment(weight: Weight, name: str) -> Weight:
    if not isinstance(weight, np.ndarray):
        return weight
    rows = (as_float(weight[start : start + _ROWS]) for start in range(0, len(weight), _ROWS))
    return stacked([GRID.quantize(part, name) for part in rows])
