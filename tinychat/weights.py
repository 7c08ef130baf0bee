"""The weights of one decoder under their canonical names, whatever the family or the file called them.

Fused linears are lists of row segments (q | k | v, gate | up): group scales run along the input axis, so fusing and
quantizing commute. A source hands out one layer at a time, so that a reader need not hold two copies of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinychat.config import ModelConfig
from tinychat.qtensor import Weight

LINEARS = ("qkv", "out", "up", "down")  # of a `Layer`


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. `segments` are stacked along the output axis; each has its own precision."""

    segments: tuple[Weight, ...]  # each [N_i, K]
    bias: np.ndarray | None = None  # fp32 [sum of N_i]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the whole."""
        return sum(s.shape[0] for s in self.segments), self.segments[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored in a file."""
        return sum(
            s.nbytes if isinstance(s, np.ndarray) else int(np.ceil(s.bits_per_weight * s.shape[0] * s.shape[1] / 8))
            for s in self.segments
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder block."""

    norm1: np.ndarray  # fp32 [hidden_size], before attention
    qkv: Linear  # q | k | v
    out: Linear
    norm2: np.ndarray  # fp32 [hidden_size], before the MLP
    up: Linear  # gate | up
    down: Linear
    q_norm: np.ndarray | None = None  # fp32 [head_dim]
    k_norm: np.ndarray | None = None  # fp32 [head_dim]


class WeightSource(Protocol):
    """Where a backend or the quantizer takes weights from: a checkpoint on disk, or `MemoryWeights`."""

    config: ModelConfig

    def embed(self) -> np.ndarray:
        """The embedding table [vocab_size, hidden_size], in the dtype it is stored in."""
        ...

    def layer(self, index: int) -> Layer:
        """Block `index`. Reads it anew at each call; nothing is kept."""
        ...

    def norm(self) -> np.ndarray:
        """The final norm, fp32 [hidden_size]."""
        ...

    def head(self) -> Linear | None:
        """The output head; None where the embedding table serves (tied)."""
        ...

    def release(self) -> None:
        """Nothing read so far is read again soon: its memory may be taken back. Arrays stay valid."""
        ...


@dataclass(frozen=True, eq=False)
class MemoryWeights:
    """A `WeightSource` held in memory: what tests build, and what the quantizer evaluates."""

    config: ModelConfig
    embedding: np.ndarray
    layers: Sequence[Layer]
    final_norm: np.ndarray
    output_head: Linear | None = None

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.embedding

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        return self.layers[index]

    def norm(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.final_norm

    def head(self) -> Linear | None:
        """See `WeightSource`."""
        return self.output_head

    def release(self) -> None:
        """See `WeightSource`: held in memory by whoever made it."""
