"""The weights of one decoder under their canonical names, whatever the family or the file called them.

Fused linears are lists of row segments (q | k | v, gate | up): group scales run along the input axis, so fusing and
quantizing commute. A source hands out one layer at a time, so that a reader need not hold two copies of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinychat.config import Block, ModelConfig
from tinychat.qtensor import Weight, round_symmetric

LINEARS = ("qkv", "out", "up", "down")  # of every `Layer`
OF_EXPERTS = ("router", "shared_up", "shared_down")  # more of one with experts
QUANTIZED = ("qkv", "out", "up", "down", "shared_up", "shared_down")  # those that a quantizer takes: not the router
NORMS = ("norm1", "norm1_bias", "norm2", "norm2_bias", "q_norm", "k_norm")  # likewise


def norm_sizes(config: ModelConfig) -> dict[str, int]:
    """The vectors of a `Layer` that a model has, of NORMS, and their lengths."""
    names = ["norm1"] if config.block is Block.PARALLEL_ONE_NORM else ["norm1", "norm2"]
    names += [f"{name}_bias" for name in names if config.norm_bias]
    heads = dict.fromkeys(("q_norm", "k_norm") if config.qk_norm else (), config.head_dim)
    return dict.fromkeys(names, config.hidden_size) | heads


def linears(config: ModelConfig, layer: int) -> tuple[str, ...]:
    """The linears of block `layer`, in the order of the forward pass."""
    experts = config.experts_of(layer)
    if experts is None:
        return LINEARS
    return ("qkv", "out", "router", *(OF_EXPERTS[1:] if experts.shared_size else ()), "up", "down")


@dataclass(frozen=True, eq=False)
class Linear:
    """y = x W^T + b. `segments` are stacked along the output axis; each has its own precision."""

    segments: tuple[Weight, ...]  # each [N_i, K]
    bias: np.ndarray | None = None  # fp32 [sum of N_i]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the whole."""
        return sum(s.shape[0] for s in self.segments), self.segments[0].shape[1]

    def parts(self, n: int) -> tuple[Linear, ...]:
        """The linears of n experts that are stacked in this one."""
        each = len(self.segments) // n
        biases = [None] * n if self.bias is None else np.split(self.bias, n)
        return tuple(Linear(self.segments[i * each : (i + 1) * each], biases[i]) for i in range(n))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights as they are stored in a file."""
        return sum(
            s.nbytes if isinstance(s, np.ndarray) else int(np.ceil(s.bits_per_weight * s.shape[0] * s.shape[1] / 8))
            for s in self.segments
        )


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder block. In one with experts, `up` and `down` are those of all experts, stacked along the outputs."""

    norm1: np.ndarray  # fp32 [hidden_size], before attention
    qkv: Linear  # q | k | v
    out: Linear
    norm2: np.ndarray | None  # fp32 [hidden_size], before the MLP; None: norm1 serves
    up: Linear  # gate | up, or up alone; of experts: gate | up | gate | up ...
    down: Linear
    router: Linear | None = None  # [n_experts, hidden_size], and a row for the shared expert's gate
    shared_up: Linear | None = None  # of the shared expert, as `up`
    shared_down: Linear | None = None
    q_norm: np.ndarray | None = None  # fp32 [head_dim]
    k_norm: np.ndarray | None = None  # fp32 [head_dim]
    norm1_bias: np.ndarray | None = None  # fp32 [hidden_size]
    norm2_bias: np.ndarray | None = None  # fp32 [hidden_size]
    act_scale: np.ndarray | None = None  # fp32 [intermediate_size]: what `down` reads is divided by it


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

    def norm_bias(self) -> np.ndarray | None:
        """The final norm's bias, fp32 [hidden_size]."""
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
    final_norm_bias: np.ndarray | None = None

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.embedding

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        return self.layers[index]

    def norm(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.final_norm

    def norm_bias(self) -> np.ndarray | None:
        """See `WeightSource`."""
        return self.final_norm_bias

    def head(self) -> Linear | None:
        """See `WeightSource`."""
        return self.output_head

    def release(self) -> None:
        """See `WeightSource`: held in memory by whoever made it."""


class RoundedHead:
    """`source` with its output head rounded to 8 bits, and a tied embedding with it: what `head=8` asks of a backend.

    For those that hold a rounded head as any other `QTensor`; widens a tied table to fp32.
    """

    def __init__(self, source: WeightSource):
        self.source = source
        self.config = source.config

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        table = self.source.embed()
        return round_symmetric(table).dequantize() if self.config.tied_head else table

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        return self.source.layer(index)

    def norm(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.source.norm()

    def norm_bias(self) -> np.ndarray | None:
        """See `WeightSource`."""
        return self.source.norm_bias()

    def head(self) -> Linear:
        """See `WeightSource`; segments that are quantized already stay as they are."""
        found = self.source.head() or Linear((self.source.embed(),))
        rounded = (round_symmetric(s) if isinstance(s, np.ndarray) else s for s in found.segments)
        return Linear(tuple(rounded), found.bias)

    def release(self) -> None:
        """See `WeightSource`."""
        self.source.release()
