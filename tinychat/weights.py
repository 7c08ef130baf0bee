"""The weights of one decoder under their canonical names, whatever the family or the file called them.

Fused linears are lists of row segments (q | k | v, gate | up): group scales run along the input axis, so fusing and
quantizing commute. A source hands out one layer at a time, so that a reader need not hold two copies of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tinychat.config import Block, ModelConfig, QKNorm
from tinychat.qtensor import Weight, round_symmetric

LINEARS = ("qkv", "out", "up", "down")  # of every `Layer`
OF_EXPERTS = ("router", "shared_up", "shared_down")  # more of one with experts
QUANTIZED = ("qkv", "out", "up", "down", "shared_up", "shared_down")  # those that a quantizer takes: not the router
ROW_NORMS = ("norm1", "norm2", "out_norm", "down_norm")  # of rows, each with perhaps a bias
NORMS = (*ROW_NORMS, *(f"{name}_bias" for name in ROW_NORMS), "q_norm", "k_norm")  # likewise
_ROW_NORMS_OF = {
    Block.PARALLEL_ONE_NORM: ("norm1",),
    Block.SANDWICH: ROW_NORMS,
    Block.NORM_AFTER: ("out_norm", "down_norm"),
}


def norm_sizes(config: ModelConfig) -> dict[str, int]:
    """The vectors of a `Layer` that a model has, of NORMS, and their lengths."""
    names = _ROW_NORMS_OF.get(config.block, ("norm1", "norm2"))
    sizes = dict.fromkeys(names, config.hidden_size)
    if config.norm_bias:
        sizes |= dict.fromkeys((f"{name}_bias" for name in names), config.hidden_size)
    if config.qk_norm is QKNorm.HEAD:
        sizes |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
    elif config.qk_norm is QKNorm.WHOLE:
        sizes |= {"q_norm": config.q_size, "k_norm": config.kv_size}
    return sizes


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
    """One decoder block. Which norms it has and what they are applied to: see `config.Block` and `config.QKNorm`.

    In one with experts, `up` and `down` are those of all experts, stacked along the outputs.
    """

    qkv: Linear  # q | k | v
    out: Linear
    up: Linear  # gate | up, or up alone; of experts: gate | up | gate | up ...
    down: Linear
    router: Linear | None = None  # [n_experts, hidden_size], and a row for the shared expert's gate
    shared_up: Linear | None = None  # of the shared expert, as `up`
    shared_down: Linear | None = None
    norm1: np.ndarray | None = None  # fp32 [hidden_size], as all row norms and their biases
    norm2: np.ndarray | None = None
    out_norm: np.ndarray | None = None  # of what attention adds
    down_norm: np.ndarray | None = None  # of what the MLP adds
    norm1_bias: np.ndarray | None = None
    norm2_bias: np.ndarray | None = None
    out_norm_bias: np.ndarray | None = None
    down_norm_bias: np.ndarray | None = None
    q_norm: np.ndarray | None = None  # fp32 [head_dim] or [q_size]
    k_norm: np.ndarray | None = None  # fp32 [head_dim] or [kv_size]
    act_scale: np.ndarray | None = None  # fp32 [intermediate_size]: what `down` reads is divided by it


@dataclass(frozen=True, eq=False)
class Ends:
    """What some models have before the first block and after the last, beside embedding, final norm and head."""

    positions: np.ndarray | None = None  # [position_offset + max_positions, hidden_size], added to embeddings
    norm: np.ndarray | None = None  # fp32 [hidden_size], of the sum
    norm_bias: np.ndarray | None = None
    project_in: Linear | None = None  # [hidden_size, embed_size], of embeddings
    project_out: Linear | None = None  # [embed_size, hidden_size], of what the head reads


class WeightSource(Protocol):
    """Where a backend or the quantizer takes weights from: a checkpoint on disk, or `MemoryWeights`."""

    config: ModelConfig

    def embed(self) -> np.ndarray:
        """The embedding table [vocab_size, table_width], in the dtype it is stored in."""
        ...

    def layer(self, index: int) -> Layer:
        """Block `index`. Reads it anew at each call; nothing is kept."""
        ...

    def ends(self) -> Ends:
        """What there is beside embedding, final norm and head."""
        ...

    def norm(self) -> np.ndarray | None:
        """The final norm, fp32 [hidden_size]; None where there is none."""
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
    final_norm: np.ndarray | None
    output_head: Linear | None = None
    final_norm_bias: np.ndarray | None = None
    other_ends: Ends = Ends()

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.embedding

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        return self.layers[index]

    def ends(self) -> Ends:
        """See `WeightSource`."""
        return self.other_ends

    def norm(self) -> np.ndarray | None:
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


class Wrapped:
    """`source`, of which a subclass changes a part; a `WeightSource`."""

    def __init__(self, source: WeightSource):
        self.source = source
        self.config = source.config

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        return self.source.embed()

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        return self.source.layer(index)

    def ends(self) -> Ends:
        """See `WeightSource`."""
        return self.source.ends()

    def norm(self) -> np.ndarray | None:
        """See `WeightSource`."""
        return self.source.norm()

    def norm_bias(self) -> np.ndarray | None:
        """See `WeightSource`."""
        return self.source.norm_bias()

    def head(self) -> Linear | None:
        """See `WeightSource`."""
        return self.source.head()

    def release(self) -> None:
        """See `WeightSource`."""
        self.source.release()


class RoundedHead(Wrapped):
    """`source` with its output head rounded to 8 bits, and a tied embedding with it: what `head=8` asks of a backend.

    For those that hold a rounded head as any other `QTensor`; widens a tied table to fp32.
    """

    def embed(self) -> np.ndarray:
        """See `WeightSource`."""
        table = self.source.embed()
        return round_symmetric(table).dequantize() if self.config.tied_head else table

    def head(self) -> Linear:
        """See `WeightSource`; segments that are quantized already stay as they are."""
        found = self.source.head() or Linear((self.source.embed(),))
        rounded = (round_symmetric(s) if isinstance(s, np.ndarray) else s for s in found.segments)
        return Linear(tuple(rounded), found.bias)
