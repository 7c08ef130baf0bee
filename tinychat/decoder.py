"""The forward pass of a decoder, in PyTorch, for every architecture: what the lowered C++ decoder is checked against.

The block is a handful of free functions over an `Ops` (a backend's operations) and a `Context` (who attends to whom),
so that the quantizer runs one layer alone and sees what each linear sees by wrapping `Ops.linear`. Rows are always
flat, [T, hidden_size]; a `Context` says which rows belong together. It knows no device layout and no model's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from tinychat import rope
from tinychat.cache import KVCache, Rows, dequantize_entries, quantize_entries
from tinychat.config import Activation, Block, Experts, ModelConfig, Norm, QKNorm, Rope
from tinychat.weights import LINEARS, NORMS, OF_EXPERTS, Ends, Layer, Linear, WeightSource

Tensor = torch.Tensor
Added = tuple[Tensor, ...]  # what the residual stream is yet to be given: it is added where the stream is read next


class Ops(Protocol):
    """What a backend does. `Any` is its packed linear; `pack`, `vector` and `table` are called at load only."""

    dtype: torch.dtype  # of activations

    def context(self, config: ModelConfig, rows: Rows, cache: KVCache) -> Any:
        """What `attention` wants to know of a step; its `positions` are int64 [T]. ValueError where `cache` does not
        take the rows (see `KVCache.check`)."""
        ...

    def indices(self, values: np.ndarray) -> Tensor:
        """Integers of a step, int64, where the backend computes."""
        ...

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

    def logits(self, x: Tensor, weight: Any) -> Tensor:
        """The same of the output head, in fp32 at least."""
        ...

    def norm(self, x: Tensor, weight: Tensor, eps: float, kind: Norm = Norm.RMS, bias: Tensor | None = None) -> Tensor:
        """A norm over the last axis."""
        ...

    def add_norm(
        self,
        x: Tensor,
        added: Added,
        scale: float,
        weight: Tensor,
        eps: float,
        kind: Norm = Norm.RMS,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, norm(y)) of y = `summed(x, added, scale)`."""
        ...

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: ModelConfig,
        index: int,
        context: Any,
        norms: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Causal attention of layer `index`: rotates q and k, stores k and v in the context's cache, attends.

        q [T, n_heads, head_dim], k and v [T, n_kv_heads, head_dim], before rotation. Before it, each head of q and of
        k goes through an RMSNorm with these weights. Returns [T, n_heads * head_dim].
        """
        ...

    def activation(self, up: Tensor, kind: Activation, gated: bool = True, act_scale: Tensor | None = None) -> Tensor:
        """act(gate) * up, or act(up), over `act_scale` [intermediate_size]: [T, up_size] -> [T, intermediate_size]."""
        ...


@dataclass(frozen=True, eq=False)
class Span:
    """Rows of one sequence: `rows` int64 [n] are their indices in the step, at positions start, start + 1, ..."""

    rows: Tensor
    slot: int
    start: int


@dataclass(frozen=True, eq=False)
class Context:
    """Which rows of a step see which: its spans, the positions and rotary angles of its rows, the cache behind them.

    positions  int64 [T]
    angles     for each of the config's `ropes` cosines and sines, fp32 [T, rope.dim / 2]
    cache      or None: spans stand alone and nothing is kept
    """

    spans: tuple[Span, ...]
    positions: Tensor
    angles: tuple[tuple[Tensor, Tensor], ...]
    cache: KVCache | None = None

    @staticmethod
    def of_rows(config: ModelConfig, rows: Rows, cache: KVCache) -> Context:
        """A step's rows, each span a slot of `cache` (which must take them: see `KVCache.check`)."""
        lengths = cache.check(rows)
        spans = []
        for slot in np.unique(rows.slots).tolist():
            indices = np.flatnonzero(rows.slots == slot)
            spans.append(Span(torch.from_numpy(indices), slot, int(cache.lengths[slot])))
        angles = _angles(config.ropes, rows.positions, lengths[rows.slots])
        return Context(tuple(spans), torch.from_numpy(rows.positions).long(), angles, cache)

    @staticmethod
    def of_sequences(config: ModelConfig, lengths: Sequence[int]) -> Context:
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
        angles = _angles(config.ropes, positions, np.repeat(np.asarray(lengths, np.int32), lengths))
        return Context(spans, torch.from_numpy(positions).long(), angles)

    def to(self, device: torch.device) -> Context:
        """The same on `device`, of what has no cache."""
        spans = tuple(replace(span, rows=span.rows.to(device)) for span in self.spans)
        angles = tuple((cos.to(device), sin.to(device)) for cos, sin in self.angles)
        return Context(spans, self.positions.to(device), angles)

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


def _angles(ropes: Sequence[Rope], positions: np.ndarray, seq_lens: np.ndarray) -> tuple[tuple[Tensor, Tensor], ...]:
    """See `rope.angles`."""
    found = (rope.angles(table, positions, seq_lens) for table in ropes)
    return tuple((torch.from_numpy(cos), torch.from_numpy(sin)) for cos, sin in found)


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

    qkv: Any
    out: Any
    up: Any  # of experts: a tuple, one for each
    down: Any  # likewise
    norm1: Tensor | None = None
    norm2: Tensor | None = None
    out_norm: Tensor | None = None
    down_norm: Tensor | None = None
    norm1_bias: Tensor | None = None
    norm2_bias: Tensor | None = None
    out_norm_bias: Tensor | None = None
    down_norm_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
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


def self_attention(config: ModelConfig, ops: Ops, layer: PackedLayer, index: int, x: Tensor, context: Any) -> Tensor:
    """Attention on normed rows, output projection included, residual not: [T, hidden_size] -> [T, hidden_size]."""
    c = config
    qkv = ops.linear(x, layer.qkv)
    if c.clip_qkv is not None:
        qkv = qkv.clamp(-c.clip_qkv, c.clip_qkv)
    q, k, v = qkv.split([c.q_size, c.kv_size, c.kv_size], dim=-1)
    if c.qk_norm is QKNorm.WHOLE:
        q, k = _normed(c, ops, layer, "q_norm", q), _normed(c, ops, layer, "k_norm", k)
    q = q.unflatten(-1, (c.n_heads, c.head_dim))
    k = k.unflatten(-1, (c.n_kv_heads, c.head_dim))
    v = v.unflatten(-1, (c.n_kv_heads, c.head_dim))
    norms = None
    if c.qk_norm is QKNorm.HEAD and layer.q_norm is not None and layer.k_norm is not None:
        norms = layer.q_norm, layer.k_norm
    return ops.linear(ops.attention(q, k, v, c, index, context, norms), layer.out)


def mlp(config: ModelConfig, ops: Ops, layer: PackedLayer, x: Tensor) -> Tensor:
    """The MLP, or the experts, on normed rows, residual not included: [T, hidden_size] -> [T, hidden_size]."""
    if config.experts is not None and layer.router is not None:
        return _mixture(config, config.experts, ops, layer, x)
    return _mlp(config, ops, x, layer.up, layer.down, layer.act_scale)


def _mlp(config: ModelConfig, ops: Ops, x: Tensor, up: Any, down: Any, act_scale: Tensor | None = None) -> Tensor:
    return ops.linear(ops.activation(ops.linear(x, up), config.activation, config.gated, act_scale), down)


def _mixture(config: ModelConfig, experts: Experts, ops: Ops, layer: PackedLayer, x: Tensor) -> Tensor:
    logits = ops.linear(x, layer.router)  # [T, router_size]
    probabilities, chosen = logits[:, : experts.n_experts].softmax(-1).topk(experts.n_used)  # [T, n_used]
    if experts.normalized:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    added = torch.zeros_like(x)
    told = chosen.flatten().cpu()  # the one wait for a device; pairs of a row and an expert
    pairs, counts = told.argsort(stable=True).to(x.device), told.bincount(minlength=experts.n_experts).tolist()
    for up, down, of_expert in zip(layer.up, layer.down, pairs.split(counts), strict=True):
        if len(of_expert):
            rows = of_expert // experts.n_used
            added[rows] += probabilities.flatten()[of_expert, None] * _mlp(config, ops, x[rows], up, down)
    if layer.shared_up is not None:
        added += logits[:, -1:].sigmoid() * _mlp(config, ops, x, layer.shared_up, layer.shared_down)
    return added


def block(config: ModelConfig, ops: Ops, layer: PackedLayer, index: int, x: Tensor, context: Any) -> Tensor:
    """Decoder block `index`: [T, hidden_size] -> [T, hidden_size]. `config.Block` has the formulas."""
    return summed(*_block(config, ops, layer, index, x, (), context), config.residual_scale)


def summed(x: Tensor, added: Added, scale: float) -> Tensor:
    """x + scale * (the first of `added`) + scale * (the second) ..."""
    for part in added:
        x = x + (part if scale == 1 else part * scale)
    return x


def _block(
    config: ModelConfig, ops: Ops, layer: PackedLayer, index: int, x: Tensor, added: Added, context: Any
) -> tuple[Tensor, Added]:
    """The block on x and what is yet to be added to it; so is its result, for the next norm to sum while it reads."""
    c = config
    before = c.block not in (Block.NORM_AFTER, Block.POST_NORM)
    if before:
        x, normed = _add_normed(c, ops, layer, "norm1", x, added)
    else:
        x = normed = summed(x, added, c.residual_scale)
    attended = self_attention(c, ops, layer, index, normed, context)
    if layer.out_norm is not None:
        attended = _normed(c, ops, layer, "out_norm", attended)
    if c.block.parallel:
        normed = normed if layer.norm2 is None else _normed(c, ops, layer, "norm2", x)
        return x, (attended, mlp(c, ops, layer, normed))
    if c.block is Block.POST_NORM:
        x = normed = _add_normed(c, ops, layer, "norm1", x, (attended,))[1]
    elif layer.norm2 is not None:
        x, normed = _add_normed(c, ops, layer, "norm2", x, (attended,))
    else:
        x = normed = summed(x, (attended,), c.residual_scale)
    made = mlp(c, ops, layer, normed)
    if layer.down_norm is not None:
        made = _normed(c, ops, layer, "down_norm", made)
    if c.block is Block.POST_NORM:
        return _add_normed(c, ops, layer, "norm2", x, (made,))[1], ()
    return x, (made,)


def _normed(config: ModelConfig, ops: Ops, layer: PackedLayer, name: str, x: Tensor) -> Tensor:
    """One of the layer's norms, over the last axis."""
    bias = getattr(layer, f"{name}_bias", None)
    return ops.norm(x, getattr(layer, name), config.norm_eps, config.norm, bias)


def _add_normed(
    config: ModelConfig, ops: Ops, layer: PackedLayer, name: str, x: Tensor, added: Added
) -> tuple[Tensor, Tensor]:
    """(the sum, its norm): see `Ops.add_norm`."""
    c, bias = config, getattr(layer, f"{name}_bias")
    return ops.add_norm(x, added, c.residual_scale, getattr(layer, name), c.norm_eps, c.norm, bias)


class Entrance:
    """From tokens to what the first block reads."""

    def __init__(self, config: ModelConfig, ops: Ops, embedding: np.ndarray, ends: Ends):
        """embedding [vocab_size, table_width]."""
        self._config = config
        self._ops = ops
        self._embed = ops.table(embedding)
        self._positions = None if ends.positions is None else ops.table(ends.positions)
        self._project = None if ends.project_in is None else ops.pack(ends.project_in)
        self._norm = None if ends.norm is None else ops.vector(ends.norm)
        self._norm_bias = None if ends.norm_bias is None else ops.vector(ends.norm_bias)

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        tensors = (self._embed, self._positions, self._norm, self._norm_bias)
        packed = 0 if self._project is None else self._ops.packed_bytes(self._project)
        return packed + sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def of_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """int64 [T] both -> [T, hidden_size] in the activations' dtype."""
        x = self._embed[tokens].to(self._ops.dtype)
        if self._config.embed_scale != 1:
            x = x * self._config.embed_scale
        return self.of_embeddings(x if self._project is None else self._ops.linear(x, self._project), positions)

    def of_embeddings(self, x: Tensor, positions: Tensor) -> Tensor:
        """The same of vectors in the place of tokens' embeddings, [T, hidden_size]."""
        c = self._config
        if self._positions is not None and c.position_offset is not None:
            x = x + self._positions[positions + c.position_offset].to(x.dtype)
        return x if self._norm is None else self._ops.norm(x, self._norm, c.norm_eps, c.norm, self._norm_bias)


class Decoder:
    """A whole model on one `Ops`: a `Runner` (see `backends`). Packs the source layer by layer."""

    def __init__(
        self, source: WeightSource, ops: Ops, cache: KVCache, progress: Callable[[int, int], None] | None = None
    ):
        """`progress(done, total)` is called after each layer."""
        self.config = c = source.config
        self.cache = cache
        self._ops = ops
        embedding = np.require(source.embed(), requirements=["C", "W"])  # one copy, shared with a tied head
        ends = source.ends()
        c.check_capacity(cache.capacity)
        self._entrance = Entrance(c, ops, embedding, ends)
        self._layers: list[PackedLayer] = []
        for index in range(c.n_layers):
            experts = c.experts_of(index)
            self._layers.append(pack_layer(ops, source.layer(index), experts.n_experts if experts else 0))
            if progress:
                progress(index + 1, c.n_layers)
        norm, norm_bias, head = source.norm(), source.norm_bias(), source.head()
        self._norm = None if norm is None else ops.vector(norm)
        self._norm_bias = None if norm_bias is None else ops.vector(norm_bias)
        self._project = None if ends.project_out is None else ops.pack(ends.project_out)
        self._head = ops.pack(head if head is not None else Linear((embedding,)))
        self.weight_bytes = self._entrance.nbytes + sum(map(self._layer_bytes, self._layers))
        self.weight_bytes += 0 if self._norm is None else self._norm.nbytes
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
        context = self._ops.context(self.config, rows, self.cache)
        x = self._entered(rows, context)
        logits = self.forward(x, context, self._ops.indices(rows.wanted))
        np.add.at(self.cache.lengths, rows.slots, 1)
        return logits.float().cpu().numpy()

    def enter(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What `forward` takes of tokens, int64 [T] both."""
        return self._entrance.of_tokens(tokens, positions)

    def forward(self, x: Tensor, context: Any, wanted: Tensor | None = None) -> Tensor:
        """All blocks on x [T, hidden_size]; logits of the rows `wanted` (None: all), [R, vocab_size].

        It touches nothing outside the backend's own memory.
        """
        c, ops = self.config, self._ops
        added: Added = ()
        for index, layer in enumerate(self._layers):
            x, added = _block(c, ops, layer, index, x, added, context)
        if wanted is not None:
            if not len(wanted):
                return torch.zeros((0, c.vocab_size))
            x, added = x[wanted], tuple(part[wanted] for part in added)
        if self._norm is None:
            x = summed(x, added, c.residual_scale)
        else:
            x = ops.add_norm(x, added, c.residual_scale, self._norm, c.norm_eps, c.norm, self._norm_bias)[1]
        if self._project is not None:
            x = ops.linear(x, self._project)
        logits = ops.logits(x, self._head)
        if c.logit_scale != 1:
            logits = logits * c.logit_scale
        return logits if c.logit_cap is None else c.logit_cap * torch.tanh(logits / c.logit_cap)

    def _entered(self, rows: Rows, context: Any) -> Tensor:
        """[T, hidden_size] in the activations' dtype."""
        if rows.embeddings is not None:
            embeddings = torch.from_numpy(rows.embeddings).to(context.positions.device, self._ops.dtype)
            return self._entrance.of_embeddings(embeddings, context.positions)
        if rows.tokens is None:
            raise ValueError("rows have neither tokens nor embeddings")
        if len(rows.tokens) and not 0 <= rows.tokens.min() <= rows.tokens.max() < self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        return self.enter(self._ops.indices(rows.tokens), context.positions)
