"""The operations of a decoder (see `decoder.Ops`) on our CUDA kernels: shapes and dtypes are checked here, kernels get
addresses.

The same kernels run on the CPU's tensors through `tinychat._cuda_host`, which is how they are tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinychat.backends.cuda_cache import DeviceAngles, DeviceCache, DeviceContext, Stretch, stretches
from tinychat.backends.cuda_linear import CudaLinear, stream
from tinychat.backends.cuda_packing import tensor
from tinychat.cache import KVCache, Rows
from tinychat.config import Activation, ModelConfig, Norm
from tinychat.decoder import Added
from tinychat.errors import BackendError
from tinychat.weights import Linear

Tensor = torch.Tensor

TYPES = {torch.float16: 1, torch.bfloat16: 2}  # csrc/cuda/stream.h, Dtype
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU: 1, Activation.GELU_TANH: 2, Activation.RELU: 3}
_FEW = 8  # rows of a stretch that go through the kernel of single rows: a mask would cost more
_PIECE = 512  # rows of a prompt that share a mask: [rows, positions] of each head under ALiBi
_SCORES = 2**25  # numbers of capped scores, or of a mask under ALiBi, at once
_SPLIT = 64  # positions worth a block of their own
_GROUPED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)  # torch's attention knows grouped queries
# Not cuDNN, which makes a plan for each length that it has not met: up to half a second, at every turn of a chat.
_WAYS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear that is not quantized."""

    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]


class CudaOps:
    """See `decoder.Ops`. `kernels` is `tinychat._cuda`, or `tinychat._cuda_host` with a CPU's tensors."""

    def __init__(self, kernels: ModuleType, config: ModelConfig, cache: DeviceCache, dtype: torch.dtype):
        """For steps of `config` on `cache`; `dtype` of activations: fp16 or bf16."""
        self.dtype = dtype
        self.device: torch.device = cache.keys.device
        self.kernels: Any = kernels
        self._config = config
        self._table: tuple[np.ndarray, Tensor] | None = None
        if config.head_dim > kernels.WIDEST_HEAD:
            raise BackendError(f"heads of {config.head_dim}; the cuda backend has at most {kernels.WIDEST_HEAD}")
        if config.norm is not Norm.RMS and config.qk_norm.value == "head":
            raise BackendError("LayerNorm of single heads; the cuda backend has RMSNorm alone")
        self.angles = DeviceAngles(config.ropes, cache.capacity, self.device)
        self._slopes = self.vector(np.array(config.slopes, np.float32)) if config.slopes else None
        group = config.n_heads // config.n_kv_heads
        blocks = config.n_kv_heads * -(-group // (1 if group == 1 else 4 if group <= 4 else 8))
        wanted = -(-2 * self._multiprocessors() // blocks)
        self._splits = max(1, min(wanted, -(-cache.capacity // _SPLIT), kernels.MOST_SPLITS))
        parts = self._splits * config.n_heads  # at most: rows share them
        self._partial = torch.empty(parts * (cache.padded + 2), dtype=torch.float32, device=self.device)
        self._arrived = torch.zeros(parts, dtype=torch.int32, device=self.device)
        self._grouped = _GROUPED and (self.device.type != "cuda" or _flash(self.device))

    def _multiprocessors(self) -> int:
        index = self.device.index if self.device.type == "cuda" else None
        return self.kernels.device(index)["multiprocessors"] if index is not None else 8

    @property
    def stream(self) -> int:
        """Of the launches: torch's own, so that they are captured with its operations."""
        return stream(self.device)

    # ---- at load

    def pack(self, linear: Linear) -> Dense | CudaLinear:
        """Plain segments as one matrix in the activations' dtype, others in the kernels' layout."""
        plain = [segment for segment in linear.segments if isinstance(segment, np.ndarray)]
        if len(plain) < len(linear.segments):
            return CudaLinear.pack(linear, self.device, self.dtype)
        bias = None if linear.bias is None else tensor(linear.bias, self.device).to(self.dtype)
        if self._table is not None and len(linear.segments) == 1 and linear.segments[0] is self._table[0]:
            return Dense(self._table[1], bias)
        return Dense(torch.cat([tensor(segment, self.device).to(self.dtype) for segment in plain]), bias)

    def vector(self, values: np.ndarray) -> Tensor:
        """A norm's weight: fp32."""
        return tensor(np.asarray(values, np.float32), self.device)

    def table(self, values: np.ndarray) -> Tensor:
        """An embedding table in the activations' dtype; a head that is the same array shares it."""
        made = tensor(values, self.device).to(self.dtype)
        if self._table is None:
            self._table = values, made
        return made

    def packed_bytes(self, packed: Any) -> int:
        """Bytes on the device."""
        if isinstance(packed, CudaLinear):
            return packed.nbytes
        return packed.weight.nbytes + (0 if packed.bias is None else packed.bias.nbytes)

    # ---- in a step

    def context(self, config: ModelConfig, rows: Rows, cache: KVCache) -> DeviceContext:
        """See `decoder.Ops.context`."""
        assert isinstance(cache, DeviceCache)
        lengths = cache.check(rows)
        sent = self.indices(np.stack([rows.positions, rows.slots]))
        runs = stretches(rows)
        angles = self.angles.alone(sent[0]) if runs is None else self.angles.of_rows(rows, lengths, sent[0])
        return DeviceContext(sent[0], sent[1], angles, cache, runs)

    def indices(self, values: np.ndarray) -> Tensor:
        """int64 on the device."""
        return torch.from_numpy(values.astype(np.int64)).to(self.device, non_blocking=True)

    def linear(self, x: Tensor, weight: Any) -> Tensor:
        """y = x W^T + b: [T, K] -> [T, N]."""
        if isinstance(weight, CudaLinear):
            return weight(x)
        return torch.nn.functional.linear(x, weight.weight, weight.bias)

    def logits(self, x: Tensor, weight: Any) -> Tensor:
        """The same in fp32: of the head."""
        return weight(x, wide=True) if isinstance(weight, CudaLinear) else self.linear(x, weight).float()

    def norm(self, x: Tensor, weight: Tensor, eps: float, kind: Norm = Norm.RMS, bias: Tensor | None = None) -> Tensor:
        """See `decoder.Ops.norm`; x [T, width], rows as far apart as they like."""
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(x, x.stride(0), (), 1.0, None, weight, eps, kind, bias, y)
        return y

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
        """See `decoder.Ops.add_norm`: at most two are added."""
        total, y = torch.empty_like(x) if added else x, torch.empty_like(x)
        self._norm(x, x.stride(0), added, scale, total if added else None, weight, eps, kind, bias, y)
        return total, y

    def _norm(
        self,
        x: Tensor,
        stride: int,
        added: Added,
        scale: float,
        total: Tensor | None,
        weight: Tensor,
        eps: float,
        kind: Norm,
        bias: Tensor | None,
        y: Tensor,
    ) -> None:
        rows, width = x.shape
        if width > self.kernels.WIDEST_NORM:
            raise BackendError(f"rows of {width}; the cuda backend norms at most {self.kernels.WIDEST_NORM}")
        for part in added:
            _check(part, (rows, width), self.dtype)
        if x.dtype != self.dtype or x.stride(1) != 1 or weight.shape != (width,) or len(added) > 2:
            raise ValueError(f"a norm of {x.dtype} {list(x.shape)} by {list(weight.shape)}, {len(added)} added")
        first, second = (*added, None, None)[:2]
        self.kernels.norm(
            TYPES[self.dtype],
            x.data_ptr(),
            stride,
            _address(first),
            _address(second),
            scale,
            _address(total),
            weight.data_ptr(),
            _address(bias),
            y.data_ptr(),
            rows,
            width,
            eps,
            kind is Norm.LAYER,
            self.stream,
        )

    def activation(self, up: Tensor, kind: Activation, gated: bool = True, act_scale: Tensor | None = None) -> Tensor:
        """See `decoder.Ops.activation`."""
        rows, width = len(up), up.shape[1] // (2 if gated else 1)
        _check(up, (rows, width * (2 if gated else 1)), self.dtype)
        y = torch.empty(rows, width, dtype=up.dtype, device=up.device)
        kernel, scales = self.kernels.activation, _address(act_scale)
        kernel(
            TYPES[self.dtype],
            up.data_ptr(),
            scales,
            y.data_ptr(),
            rows,
            width,
            _ACTIVATIONS[kind],
            gated,
            self.stream,
        )
        return y

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: ModelConfig,
        index: int,
        context: DeviceContext,
        norms: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """See `decoder.Ops.attention`.

        Rows that are each alone on their slot take one kernel: norms, rotation, the cache's extension and all. Of
        others the cache is extended first; then torch's attention takes them (its formula where scores are capped), or
        our kernel of single rows where they are few.
        """
        told = self._told(q, k, v, config, index, context, norms)
        rows, heads = len(q), config.n_heads * config.head_dim
        out = torch.empty(rows, heads, dtype=self.dtype, device=q.device)
        if context.stretches is None:
            self._single(told, out, config, index, append=True)
            return out
        padded = context.cache.padded
        turned = torch.empty(rows, config.n_heads, padded, dtype=torch.float16, device=q.device)
        self.kernels.prepare(target=turned.data_ptr(), stream=self.stream, **told)
        if rows <= _FEW:
            self._single({**told, "q": turned.data_ptr()}, out, config, index, append=False)
            return out
        for stretch in context.stretches:
            out[stretch.begin : stretch.end] = self._prompt(turned, stretch, config, index, context)
        return out

    def _told(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        config: ModelConfig,
        index: int,
        context: DeviceContext,
        norms: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Any]:
        """What both kernels of attention want to know: see csrc/cuda/attention.h, Heads and Cache."""
        c, cache = config, context.cache
        for heads, n in ((q, c.n_heads), (k, c.n_kv_heads), (v, c.n_kv_heads)):
            wrong = heads.shape != (len(q), n, c.head_dim) or heads.stride()[1:] != (c.head_dim, 1)
            if wrong or heads.dtype != self.dtype:
                raise ValueError(f"heads of {heads.dtype} {list(heads.shape)}, strides {heads.stride()}")
        table = c.rope_index(index)
        cos, sin, angles = context.angles[table] if table >= 0 else (None, None, None)
        return {
            "type": TYPES[self.dtype],
            "q": q.data_ptr(),
            "k": k.data_ptr(),
            "v": v.data_ptr(),
            "q_stride": q.stride(0),
            "k_stride": k.stride(0),
            "v_stride": v.stride(0),
            "rows": len(q),
            "n_heads": c.n_heads,
            "n_kv_heads": c.n_kv_heads,
            "head_dim": c.head_dim,
            "q_norm": norms[0].data_ptr() if norms else 0,
            "k_norm": norms[1].data_ptr() if norms else 0,
            "eps": c.norm_eps,
            "cos": _address(cos),
            "sin": _address(sin),
            "angles": _address(angles),
            "rope_dim": c.ropes[table].dim if table >= 0 else 0,
            "interleaved": table >= 0 and c.ropes[table].interleaved,
            "positions": context.positions.data_ptr(),
            "slots": context.slots.data_ptr(),
            "keys": cache.keys[index].data_ptr(),
            "values": cache.values[index].data_ptr(),
            "key_scales": 0 if cache.key_scales is None else cache.key_scales[index].data_ptr(),
            "value_scales": 0 if cache.value_scales is None else cache.value_scales[index].data_ptr(),
            "capacity": cache.capacity,
            "padded": cache.padded,
        }

    def _single(self, told: dict[str, Any], out: Tensor, config: ModelConfig, index: int, *, append: bool) -> None:
        """The kernel of single rows."""
        self.kernels.attention(
            out=out.data_ptr(),
            scale=config.score_scale,
            cap=config.attention_cap or 0.0,
            slopes=_address(self._slopes),
            window=config.window(index),
            append=append,
            splits=max(1, self._splits // told["rows"]),  # more rows, fewer blocks for each
            partial=self._partial.data_ptr(),
            arrived=self._arrived.data_ptr(),
            stream=self.stream,
            **told,
        )

    def _prompt(self, q: Tensor, stretch: Stretch, config: ModelConfig, index: int, context: DeviceContext) -> Tensor:
        """torch's attention of a stretch's rows of q [T, n_heads, padded]: [n, n_heads * head_dim]."""
        with sdpa_kernel(_WAYS):
            return self._attended(q, stretch, config, index, context)

    def _attended(self, q: Tensor, stretch: Stretch, config: ModelConfig, index: int, context: DeviceContext) -> Tensor:
        c, start, n = config, stretch.start, stretch.end - stretch.begin
        keys, values = context.cache.entries(index, stretch.slot, start + n, q.dtype)  # [n_kv_heads, L, padded]
        q = q[stretch.begin : stretch.end].transpose(0, 1)  # [n_heads, n, padded]
        window, group, cap = c.window(index), c.n_heads // c.n_kv_heads, c.attention_cap
        attend = torch.nn.functional.scaled_dot_product_attention
        if not start and self._slopes is None and cap is None and not (window and window < n):
            shared: dict[str, Any] = {"enable_gqa": True} if group > 1 and self._grouped else {}
            if group > 1 and not shared:
                keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            everything = q[None], keys[None], values[None]
            mixed = attend(*everything, is_causal=True, scale=c.score_scale, **shared)[0]
        else:
            if group > 1:
                keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
            parts, length = [], _PIECE
            if cap is not None:
                keys, values = keys.float(), values.float()
            if cap is not None or self._slopes is not None:
                length = max(1, min(_PIECE, _SCORES // (c.n_heads * (start + n))))
            for first in range(0, n, length):
                begin, end = start + first, start + min(first + length, n)
                mask = self._mask(begin, end, window, context)
                given = q[None, :, first : first + length], keys[None, :, :end], values[None, :, :end], mask
                made = attend(*given, scale=c.score_scale) if cap is None else _capped(*given, c.score_scale, cap)
                parts.append(made[0])
            mixed = torch.cat(parts, dim=1)
        return mixed.transpose(0, 1)[..., : c.head_dim].flatten(1)

    def _mask(self, begin: int, end: int, window: int, context: DeviceContext) -> Tensor:
        """Whom rows at positions begin .. end - 1 see: bool [n, end], or ALiBi's bias, [n_heads, n, end].

        The former is kept for the layers that want the same; the latter would be as much as the scores of a layer.
        """
        key = (begin, end, window)
        if key in context.masks:
            return context.masks[key]
        distance = torch.arange(begin, end, device=self.device)[:, None] - torch.arange(end, device=self.device)
        seen = distance >= 0
        if window:
            seen &= distance < window
        if self._slopes is not None:
            return torch.where(seen, -self._slopes[:, None, None] * distance, -torch.inf).to(torch.float16)
        context.masks[key] = seen
        return seen


def _capped(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """torch's attention of scores cap * tanh(score / cap), which it does not know: in fp32, as keys and values are."""
    scores = (q.float() * (scale / cap)) @ keys.transpose(-1, -2)
    scores.tanh_().mul_(cap)
    if mask.dtype is torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)
    return scores.softmax(-1) @ values


def _flash(device: torch.device) -> bool:
    """Whether torch's flash attention runs there: without it, that of grouped queries makes all scores in fp32."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"{dtype} {list(shape)} in one piece is expected; found {tensor.dtype} {list(tensor.shape)}")
