"""The reference backend: plain PyTorch, every operation spelled out. It specifies what the other backends compute.

Codes stay packed, in as many bits as they have, and are dequantized at each call: slow, small and hard to get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.cache import KV_DTYPES, KVCache, Rows
from tinychat.config import Activation, ModelConfig, Norm
from tinychat.errors import UsageError
from tinychat.memory import Footprint
from tinychat.qtensor import QTensor, Weight, bfloat16, canonical
from tinychat.weights import Linear, RoundedHead, WeightSource

try:
    import torch

    from tinychat.decoder import Added, Context, Decoder, summed
except (ImportError, OSError) as error:  # OSError: a shared library of an incomplete installation
    _missing: str | None = f"PyTorch does not load ({error}); install it with: pip install torch"
else:
    _missing = None

FOOTPRINT = Footprint(program=256 << 20, step_bytes=4)  # PyTorch itself; what a step computes with in fp32
TOGETHER = 8  # codes, which fill whole bytes whatever their width


def available() -> str | None:
    """None, or why this backend cannot be used."""
    return _missing


def describe(threads: int | None = None) -> str:
    """One line: what runs."""
    n = threads or torch.get_num_threads()
    return f"reference: PyTorch {torch.__version__}, {n} threads; the specification, not fast"


def build(
    source: WeightSource,
    *,
    ctx_size: int,
    n_slots: int = 1,
    kv_dtype: str = "fp32",
    dtype: str = "fp32",
    activations: int = 16,
    head: int = 16,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """A runner of `source` with `n_slots` caches of `ctx_size` positions each.

    kv_dtype fp32, fp16 or int8; dtype (of activations and arithmetic) fp32 or fp64; activations: 16 alone, and they
    are not rounded at all; head: 16 for the output head as it is stored, 8 to round it; threads: PyTorch's, for the
    process; progress(done, total): called after each layer. Raises UsageError for another dtype.
    """
    if kv_dtype not in KV_DTYPES:
        raise UsageError(f"kv_dtype {kv_dtype!r}; the reference backend has {', '.join(KV_DTYPES)}")
    if activations != 16:
        raise UsageError(f"activations {activations!r}; the reference backend does not round them: leave it at 16")
    config = source.config
    cache = KVCache(config.n_layers, n_slots, config.n_kv_heads, ctx_size, config.head_dim, kv_dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    if head == 8:
        source = RoundedHead(source)
    return Decoder(source, TorchOps(dtype), cache, progress)


@dataclass(frozen=True, eq=False)
class QSegment:
    """A `QTensor` of K inputs in tensors.

    packed  uint8 [N, ceil(K / 8) * bits]: 8 codes, the first in the lowest bits, fill `bits` bytes, the lowest first
    scales  [N, groups]
    zeros   uint8 [N, groups]
    order   int64 [K]: the column of the codes that multiplies each input; None: its own
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    k: int
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        order = 0 if self.order is None else self.order.nbytes
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes + order

    def codes(self) -> torch.Tensor:
        """uint8 [N, K]."""
        steps, mask = self.packed.unflatten(1, (-1, self.bits)), (1 << self.bits) - 1
        value = steps[..., 0].long()
        for i in range(1, self.bits):
            value |= steps[..., i].long() << 8 * i
        apart = [(value >> self.bits * j).bitwise_and_(mask).to(torch.uint8) for j in range(TOGETHER)]
        return torch.stack(apart, dim=-1).flatten(1)[:, : self.k]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """w = (q - z) * s, [N, K], inputs in their own order."""
        groups = torch.arange(self.k, device=self.packed.device) // self.group_size  # [K]
        weight = (self.codes().to(dtype) - self.zeros.to(dtype)[:, groups]) * self.scales.to(dtype)[:, groups]
        return weight if self.order is None else weight[:, self.order]


@dataclass(frozen=True, eq=False)
class TorchLinear:
    """A `Linear` in tensors: segments stacked along the outputs."""

    segments: tuple[QSegment | torch.Tensor, ...]
    bias: torch.Tensor | None


class TorchOps:
    """The operations of a decoder (see `decoder.Ops`) in `dtype`, fp32 or fp64."""

    def __init__(self, dtype: str = "fp32"):
        if dtype not in ("fp32", "fp64"):
            raise UsageError(f"dtype {dtype!r}; the reference backend computes in fp32 or fp64")
        self.dtype = torch.float32 if dtype == "fp32" else torch.float64

    def context(self, config: ModelConfig, rows: Rows, cache: KVCache) -> Context:
        """See `decoder.Context`."""
        return Context.of_rows(config, rows, cache)

    def indices(self, values: np.ndarray) -> torch.Tensor:
        """int64."""
        return torch.from_numpy(values).long()

    def pack(self, linear: Linear) -> TorchLinear:
        """The same numbers in tensors."""
        bias = None if linear.bias is None else self.vector(linear.bias)
        return TorchLinear(tuple(_segment(s) for s in linear.segments), bias)

    def vector(self, values: np.ndarray) -> torch.Tensor:
        """A norm's weight, or a bias."""
        return _tensor(values).to(self.dtype)

    def table(self, values: np.ndarray) -> torch.Tensor:
        """An embedding table, in the dtype it is stored in."""
        return _tensor(values)

    def packed_bytes(self, packed: TorchLinear) -> int:
        """Bytes resident."""
        return sum(s.nbytes for s in packed.segments) + (0 if packed.bias is None else packed.bias.nbytes)

    def linear(self, x: torch.Tensor, weight: TorchLinear) -> torch.Tensor:
        """y = x W^T + b: [T, K] -> [T, N]."""
        parts = []
        for segment in weight.segments:
            plain = segment.dequantize(self.dtype) if isinstance(segment, QSegment) else segment.to(self.dtype)
            parts.append(x @ plain.T)
        y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return y if weight.bias is None else y + weight.bias

    def logits(self, x: torch.Tensor, weight: TorchLinear) -> torch.Tensor:
        """The same."""
        return self.linear(x, weight)

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        kind: Norm = Norm.RMS,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight + bias over the last axis; LayerNorm takes the mean from x first."""
        if kind is Norm.LAYER:
            x = x - x.mean(-1, keepdim=True)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    def add_norm(
        self,
        x: torch.Tensor,
        added: Added,
        scale: float,
        weight: torch.Tensor,
        eps: float,
        kind: Norm = Norm.RMS,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `decoder.Ops.add_norm`."""
        x = summed(x, added, scale)
        return x, self.norm(x, weight, eps, kind, bias)

    def activation(
        self, up: torch.Tensor, kind: Activation, gated: bool = True, act_scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """act(gate) * up of gate | up, or act(up), over `act_scale`: [T, up_size] -> [T, intermediate_size]."""
        if gated:
            gate, up = up.chunk(2, dim=-1)
            made = activated(gate, kind).mul_(up)
        else:
            made = activated(up, kind)
        return made if act_scale is None else made / act_scale

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: ModelConfig,
        index: int,
        context: Context,
        norms: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See `decoder.Ops.attention`. Spans one by one; the heads of a group are one batch entry, stacked as rows."""
        if norms is not None:
            q, k = self.norm(q, norms[0], config.norm_eps), self.norm(k, norms[1], config.norm_eps)
        if (table := config.rope_index(index)) >= 0:
            cos, sin = (angles.to(q.dtype) for angles in context.angles[table])
            turn = rotate_pairs if config.ropes[table].interleaved else rotate
            q, k = turn(q, cos, sin), turn(k, cos, sin)
        q = q * config.score_scale
        n_heads, n_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
        mixed = torch.empty(len(q), n_heads * head_dim, dtype=q.dtype)
        for span in context.spans:
            keys, values = context.extend(span, index, k[span.rows], v[span.rows])  # [n_kv_heads, L, head_dim]
            n = len(span.rows)
            grouped = q[span.rows].view(n, n_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [n_kv_heads, group, n, dim]
            mask = visible(span.start, n, keys.shape[1], config.window(index))  # [n, L]
            if config.slopes:
                mask = biased(mask, span.start, config.slopes, q.dtype).view(n_kv_heads, -1, mask.shape[1])
            else:
                mask = mask.repeat(grouped.shape[1], 1)  # [group * n, L]
            out = attended(grouped.flatten(1, 2), keys, values, mask, config.attention_cap)
            mixed[span.rows] = out.view(n_kv_heads, -1, n, head_dim).permute(2, 0, 1, 3).reshape(n, -1)
        return mixed


def activated(x: torch.Tensor, kind: Activation) -> torch.Tensor:
    """act(x), elementwise; `Activation` has the formulas."""
    if kind is Activation.SILU:
        return torch.nn.functional.silu(x)
    if kind is Activation.RELU:
        return torch.relu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if kind is Activation.GELU_TANH else "none")


def attended(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, cap: float | None
) -> torch.Tensor:
    """softmax(q keys^T) values, scores perhaps capped: [heads, rows, dim]. mask: bool, or what is added."""
    if cap is None:
        entry = q[None], keys[None], values[None]  # without a batch PyTorch holds all scores at once, and is slower
        return torch.nn.functional.scaled_dot_product_attention(*entry, attn_mask=mask, scale=1.0)[0]
    scores = cap * torch.tanh(q @ keys.transpose(1, 2) / cap)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1) @ values


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [T, heads, head_dim] by angles [T, dim / 2]: dimension j pairs with j + dim / 2, and those
    beyond dim stay."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The same where dimension 2j pairs with 2j + 1."""
    first, second = x[..., : 2 * cos.shape[-1]].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.flatten(-2), x[..., 2 * cos.shape[-1] :]], dim=-1)


def biased(seen: torch.Tensor, start: int, slopes: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """What ALiBi adds to the scores, [heads, n, L]: -slope * distance where a row sees a key, else -infinity."""
    n, length = seen.shape
    distance = torch.arange(start, start + n, dtype=dtype)[:, None] - torch.arange(length, dtype=dtype)
    bias = -torch.tensor(slopes, dtype=dtype)[:, None, None] * distance
    return torch.where(seen, bias, -torch.inf)


def visible(start: int, n: int, length: int, window: int) -> torch.Tensor:
    """bool [n, length]: row i, at position start + i, sees itself and the window - 1 before it (0: all before it)."""
    rows, keys = torch.arange(start, start + n)[:, None], torch.arange(length)[None]
    seen = keys <= rows
    return seen & (keys > rows - window) if window else seen


def _segment(weight: Weight) -> QSegment | torch.Tensor:
    weight = canonical(weight)
    if isinstance(weight, QTensor):
        order = None if weight.permutation is None else torch.from_numpy(np.argsort(weight.permutation))
        packed, groups = _packed(_tensor(weight.codes), weight.bits), (_tensor(weight.scales), _tensor(weight.zeros))
        return QSegment(packed, *groups, weight.bits, weight.group_size, weight.shape[1], order)
    return _tensor(weight)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """See `QSegment`."""
    steps = torch.nn.functional.pad(codes, (0, -codes.shape[1] % TOGETHER)).unflatten(1, (-1, TOGETHER))
    value = steps[..., 0].long()
    for j in range(1, TOGETHER):
        value |= steps[..., j].long() << bits * j
    return torch.stack([(value >> 8 * i).bitwise_and_(255).to(torch.uint8) for i in range(bits)], dim=-1).flatten(1)


def _tensor(values: np.ndarray) -> torch.Tensor:
    """The array's own memory where it can be shared; PyTorch shares none that is read-only and knows no bfloat16."""
    values = np.require(values, requirements=["C", "W"])
    if values.dtype == bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
