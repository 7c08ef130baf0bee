"""The forward pass of a decoder, in PyTorch, for every architecture: what the lowered C++ decoder is checked against.

The block is a handful of free functions over an `Ops` (a backend's operations) and a `Context` (who attends to whom),
so that the quantizer runs one layer alone and sees what each linear sees by wrapping `Ops.linear`. Rows are always
flat, [T, hidden_size]; a `Context` says which rows belong together. It knows no device layout and no model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tinychat import rope
from tinychat.cache import KVCache, Rows, dequantize_entries, quantize_entries
from tinychat.config import Activation, Block, Experts, ModelConfig, Norm, Rope
from tinychat.weights import LINEARS, NORMS, OF_EXPERTS, Layer, Linear, WeightSource

Tensor = torch.Tensor


class Ops(Protocol):
    """What a backend does. `Any` is its packed linear; `pack`, `vector` and `table` are called at load only."""

    dtype: torch.dtype  # of activations

    def pack(self, linear: Linear) -> Any:
        """The linear in the form that `linear` wants."""
        ...

    def vector(self, values: np.ndarray) -> Tensor:
        """A norm's weight."""
        ...

    def table(self, values: np.ndarray) -> Tensor:
        """The embedding table, in the dtype it is stored in."""
        ...

    def packed_bytes(self, packed: Any) -> int:
        """Bytes that a packed linear keeps resident."""
        ...

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """y = x W^T + b: [T, K] -> [T, N]."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float, kind: Norm = Norm.RMS, bias: Tensor | None = None) -> Tensor:
        """A norm over the last axis."""
        ...

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, index: int, window: int, context: Context, slopes: Sequence[float] = ()
    ) -> Tensor:
        """Causal attention of layer `index`: rotates q and k, stores k and v in the context's cache, attends.

        q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim], before rotation; a row sees itself and the
        `window` - 1 positions before it (0: all). slopes: of ALiBi, for each head. Returns [T, n_heads * head_dim].
        """
        ...

    def activation(self, up: Tensor, kind: Activation) -> Tensor:
        """act(gate) * up, or act(up): [T, up_size] -> [T, intermediate_size]."""
        ...


@dataclass(frozen=True, eq=False)
class Span:
    """Rows of one sequence: `rows` int64 [n] are their indices in the step, at positions start, start + 1, ..."""

    rows: Tensor
    slot: int
    start: int


@dataclass(frozen=True, eq=False)
class Context:
    """Which rows of a step see which: its spans, the rotary angles of its rows, and the cache behind them.

    cos, sin  fp32 [T, head_dim / 2]
    cache     or None: spans stand alone and nothing is kept
    """

    spans: tuple[Span, ...]
    cos: Tensor
    sin: Tensor
    cache: KVCache | None = None

    @staticmethod
    def of_rows(table: Rope, rows: Rows, cache: KVCache) -> Context:
        """A step's rows, each span a slot of `cache` (which must take them: see `KVCache.check`)."""
        lengths = cache.check(rows)
        spans = []
        for slot in np.unique(rows.slots).tolist():
            indices = np.flatnonzero(rows.slots == slot)
            spans.append(Span(torch.from_numpy(indices), slot, int(cache.lengths[slot])))
        cos, sin = rope.angles(table, rows.positions, lengths[rows.slots])
        return Context(tuple(spans), torch.from_numpy(cos), torch.from_numpy(sin), cache)

    @staticmethod
    def of_sequences(table: Rope, lengths: Sequence[int]) -> Context:
        """Independent causal sequences, one after the other in the rows: calibration. No cache and no padding.

        x [n_sequences, length, hidden_size] is `x.reshape(-1, hidden_size)` with `[length] * n_sequences`; with
        padding, keep the rows that are tokens and give each sequence's true length.
        """
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        spans = tuple(
            Span(torch.arange(begin, end), slot, 0)
            for slot, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        )
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        cos, sin = rope.angles(table, positions, np.repeat(np.asarray(lengths, np.int32), lengths))
        return Context(spans, torch.from_numpy(cos), torch.from_numpy(sin))

    def extend(self, span: Span, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a span's keys and values [n, n_kv_heads, head_dim]; return all it sees, [n_kv_heads, L, head_dim]."""
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if self.cache is None:
            return k, v
        cache, at = self.cache, (index, span.slot)
        if cache.key_scales is None or cache.value_scales is None:
            return _extended(span, k, cache.keys[at]), _extended(span, v, cache.values[at])
        return (
            _extended(span, k, cache.keys[at], cache.key_scales[at]),
            _extended(span, v, cache.values[at], cache.value_scales[at]),
        )


def _extended(span: Span, new: Tensor, entries: np.ndarray, scales: np.ndarray | None = None) -> Tensor:
    """Keep `new` [n_kv_heads, n, head_dim] in a slot's entries [n_kv_heads, capacity, head_dim]; all that it holds."""
    end = span.start + len(span.rows)
    if scales is None:
        torch.from_numpy(entries)[:, span.start : end] = new
        return torch.from_numpy(entries[:, :end]).to(new.dtype)
    entries[:, span.start : end], scales[:, span.start : end] = quantize_entries(new.float().numpy())
    return torch.from_numpy(dequantize_entries(entries[:, :end], scales[:, :end])).to(new.dtype)


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """A `Layer` as a backend holds it: linears packed, norms as tensors."""

    norm1: Tensor
    qkv: Any
    out: Any
    norm2: Tensor | None
    up: Any  # of experts: a tuple, one for each
    down: Any  # likewise
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    norm1_bias: Tensor | None = None
    norm2_bias: Tensor | None = None
    act_scale: Tensor | None = None
    router: Any = None
    shared_up: Any = None
    shared_down: Any = None


def pack_layer(ops: Ops, layer: Layer, n_experts: int = 0) -> PackedLayer:
    """Pack every linear of a layer; of one with experts, `n_experts` is their number."""
    made: dict[str, Any] = {}
    for name in (*LINEARS, *OF_EXPERTS):
        linear: Linear | None = getattr(layer, name)
        if linear is not None and n_experts and name in ("up", "down"):
            made[name] = tuple(map(ops.pack, linear.parts(n_experts)))
        elif linear is not None:
            made[name] = ops.pack(linear)
    for name in NORMS:
        values = getattr(layer, name)
        made[name] = None if values is None else ops.vector(values)
    made["act_scale"] = None if layer.act_scale is None else ops.vector(layer.act_scale)
    return PackedLayer(**made)


def self_attention(
    config: ModelConfig, ops: Ops, layer: PackedLayer, index: int, x: Tensor, context: Context
) -> Tensor:
    """Attention on normed rows, output projection included, residual not: [T, hidden_size] -> [T, hidden_size]."""
    q, k, v = ops.linear(x, layer.qkv).split([config.q_size, config.kv_size, config.kv_size], dim=-1)
    q = q.unflatten(-1, (config.n_heads, config.head_dim))
    k = k.unflatten(-1, (config.n_kv_heads, config.head_dim))
    v = v.unflatten(-1, (config.n_kv_heads, config.head_dim))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = ops.norm(q, layer.q_norm, config.norm_eps), ops.norm(k, layer.k_norm, config.norm_eps)
    mixed = ops.attention(q, k, v, index, config.window(index), context, config.slopes)
    return ops.linear(mixed, layer.out)


def mlp(config: ModelConfig, ops: Ops, layer: PackedLayer, x: Tensor) -> Tensor:
    """The MLP, or the experts, on normed rows, residual not included: [T, hidden_size] -> [T, hidden_size]."""
    if config.experts is not None and layer.router is not None:
        return _mixture(config, config.experts, ops, layer, x)
    return _mlp(config, ops, x, layer.up, layer.down, layer.act_scale)


def _mlp(config: ModelConfig, ops: Ops, x: Tensor, up: Any, down: Any, act_scale: Tensor | None = None) -> Tensor:
    hidden = ops.activation(ops.linear(x, up), config.activation)
    return ops.linear(hidden if act_scale is None else hidden / act_scale, down)


def _mixture(config: ModelConfig, experts: Experts, ops: Ops, layer: PackedLayer, x: Tensor) -> Tensor:
    logits = ops.linear(x, layer.router)  # [T, router_size]
    probabilities, chosen = logits[:, : experts.n_experts].softmax(-1).topk(experts.n_used)  # [T, n_used]
    if experts.normalized:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    added = torch.zeros_like(x)
    for index, (up, down) in enumerate(zip(layer.up, layer.down, strict=True)):
        rows, place = torch.nonzero(chosen == index, as_tuple=True)
        if len(rows):
            added[rows] += probabilities[rows, place, None] * _mlp(config, ops, x[rows], up, down)
    if layer.shared_up is not None:
        added += logits[:, -1:].sigmoid() * _mlp(config, ops, x, layer.shared_up, layer.shared_down)
    return added


def block(config: ModelConfig, ops: Ops, layer: PackedLayer, index: int, x: Tensor, context: Context) -> Tensor:
    """Decoder block `index`: [T, hidden_size] -> [T, hidden_size]."""
    normed = ops.norm(x, layer.norm1, config.norm_eps, config.norm, layer.norm1_bias)
    attended = self_attention(config, ops, layer, index, normed, context)
    if config.block is Block.SEQUENTIAL:
        x = x + attended
    if layer.norm2 is not None:
        normed = ops.norm(x, layer.norm2, config.norm_eps, config.norm, layer.norm2_bias)
    added = mlp(config, ops, layer, normed)
    return x + added if config.block is Block.SEQUENTIAL else x + attended + added


class Decoder:
    """A whole model on one `Ops`: a `Runner` (see `backends`). Packs the source layer by layer."""

    def __init__(
        self, source: WeightSource, ops: Ops, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ):
        """`progress(done, total)` is called after each layer."""
        self.config = source.config
        self.cache = cache
        self._ops = ops
        embedding = np.require(source.embed(), requirements=["C", "W"])  # one copy, shared with a tied head
        self._embed = ops.table(embedding)
        self._layers: list[PackedLayer] = []
        for index in range(self.config.n_layers):
            experts = self.config.experts_of(index)
            self._layers.append(pack_layer(ops, source.layer(index), experts.n_experts if experts else 0))
            if progress:
                progress(index + 1, self.config.n_layers)
        self._norm = ops.vector(source.norm())
        norm_bias = source.norm_bias()
        self._norm_bias = None if norm_bias is None else ops.vector(norm_bias)
        head = source.head()
        self._head = ops.pack(head if head is not None else Linear((embedding,)))
        self.weight_bytes = self._embed.nbytes + self._norm.nbytes + sum(map(self._layer_bytes, self._layers))
        if head is not None:
            self.weight_bytes += ops.packed_bytes(self._head)

    def _layer_bytes(self, layer: PackedLayer) -> int:
        norms = [getattr(layer, name) for name in NORMS]
        found = [getattr(layer, name) for name in (*LINEARS, *OF_EXPERTS)]
        linears = [one for linear in found for one in (linear if isinstance(linear, tuple) else (linear,))]
        sizes = [self._ops.packed_bytes(linear) for linear in linears if linear is not None]
        return sum(n.nbytes for n in norms if n is not None) + sum(sizes)

    @torch.inference_mode()
    def step(self, rows: Rows) -> np.ndarray:
        """Run `rows`, extend the cache, return fp32 logits [len(rows.wanted), vocab_size].

        Raises ValueError where the rows do not continue their slots, or a token is not in the vocabulary.
        """
        context = Context.of_rows(self.config.rope, rows, self.cache)
        x = self._embedded(rows)
        for index, layer in enumerate(self._layers):
            x = block(self.config, self._ops, layer, index, x, context)
        np.add.at(self.cache.lengths, rows.slots, 1)
        if not len(rows.wanted):
            return np.zeros((0, self.config.vocab_size), np.float32)
        x = x[torch.from_numpy(rows.wanted).long()]
        x = self._ops.norm(x, self._norm, self.config.norm_eps, self.config.norm, self._norm_bias)
        return self._ops.linear(x, self._head).float().numpy()

    def _embedded(self, rows: Rows) -> Tensor:
        """[T, hidden_size] in the activations' dtype."""
        if rows.embeddings is not None:
            return torch.from_numpy(rows.embeddings).to(self._ops.dtype)
        if rows.tokens is None:
            raise ValueError("rows have neither tokens nor embeddings")
        if len(rows.tokens) and not 0 <= rows.tokens.min() <= rows.tokens.max() < self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        return self._embed[torch.from_numpy(rows.tokens).long()].to(self._ops.dtype)
