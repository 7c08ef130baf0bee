"""A decoder in plain PyTorch with a static cache, as torch.compile and CUDA graphs like it: what gpu.py compares with.

It is written for speed under a compiler in the manner of gpt-fast (a fixed cache, positions in tensors, nothing read
back), of the same `ModelConfig` as our decoder, for the families that gpu.py measures: SwiGLU or GELU, grouped queries,
rotary halves or ALiBi, RMSNorm or LayerNorm, parallel blocks, norms of heads.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tinychat import rope
from tinychat.config import Activation, Block, ModelConfig, Norm, QKNorm

MakeLinear = Callable[[int, int], nn.Module]  # of (inputs, outputs)


class Int4(nn.Module):
    """torch's own 4-bit matmul: bf16 activations, groups along the inputs."""

    def __init__(self, inputs: int, outputs: int, group: int):
        super().__init__()
        tiles = next(n for n in (8, 4, 2) if inputs % (16 * n) == 0)
        codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
        scales = torch.rand(inputs // group, outputs, 2, dtype=torch.bfloat16) / inputs**0.5 / 8
        # buffers: a graph reads those in place, and would copy other tensors at each replay
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(codes, tiles))
        self.register_buffer("scales", scales)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, inputs] -> [T, outputs]."""
        return torch.ops.aten._weight_int4pack_mm(x, self.weight, self.group, self.scales)


class Layer(nn.Module):
    """One block; its keys and values are buffers."""

    def __init__(self, config: ModelConfig, capacity: int, linear: MakeLinear):
        super().__init__()
        c = self.config = config
        self.qkv = linear(c.hidden_size, c.q_size + 2 * c.kv_size)
        self.out = linear(c.q_size, c.hidden_size)
        self.up = linear(c.hidden_size, c.up_size)
        self.down = linear(c.intermediate_size, c.hidden_size)
        self.norm1 = norm(c)
        self.norm2 = None if c.block is Block.PARALLEL_ONE_NORM else norm(c)
        heads = c.qk_norm is QKNorm.HEAD
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if heads else None
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if heads else None
        shape = 1, c.n_kv_heads, capacity, c.head_dim
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("values", torch.zeros(shape))

    def forward(self, x, positions, angles, mask):
        """x [T, hidden_size]; angles: cosines and sines [T, head_dim / 2]; mask [T, capacity], or of each head."""
        c = self.config
        normed = self.norm1(x)
        attended = self.attention(normed, positions, angles, mask)
        if c.block.parallel:
            return x + attended + self.mlp(normed if self.norm2 is None else self.norm2(x))
        x = x + attended
        return x + self.mlp(self.norm2(x))

    def attention(self, x, positions, angles, mask):
        """Rotation, the cache and the output projection with it."""
        c, rows = self.config, len(x)
        q, k, v = self.qkv(x).split([c.q_size, c.kv_size, c.kv_size], dim=-1)
        q, k, v = (t.view(rows, -1, c.head_dim) for t in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = turned(q, *angles), turned(k, *angles)
        self.keys.index_copy_(2, positions, k.transpose(0, 1)[None])
        self.values.index_copy_(2, positions, v.transpose(0, 1)[None])
        group = c.n_heads // c.n_kv_heads
        keys, values = self.keys, self.values
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        y = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=mask[None], scale=c.score_scale
        )
        return self.out(y[0].transpose(0, 1).reshape(rows, -1))

    def mlp(self, x):
        """On normed rows."""
        c = self.config
        hidden = self.up(x)
        if c.gated:
            gate, up = hidden.chunk(2, dim=-1)
            return self.down(functional.silu(gate) * up)
        kind = "tanh" if c.activation is Activation.GELU_TANH else "none"
        return self.down(functional.gelu(hidden, approximate=kind))


class Plain(nn.Module):
    """The whole decoder, for one sequence of at most `capacity` positions."""

    def __init__(self, config: ModelConfig, capacity: int, linear: MakeLinear | None = None):
        super().__init__()
        c = self.config = config
        made = linear or (lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False))
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, capacity, made) for _ in range(c.n_layers))
        self.norm = norm(c)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tied_head:
            self.head.weight = self.embed.weight
        seen = torch.ones(capacity, capacity, dtype=torch.bool).tril()
        if c.slopes:
            distance = torch.arange(capacity)[:, None] - torch.arange(capacity)
            bias = -torch.tensor(c.slopes)[:, None, None] * distance
            seen = torch.where(seen, bias, -torch.inf)
        self.register_buffer("mask", seen)
        if c.rope.dim:
            known = np.arange(capacity, dtype=np.int32)
            for name, table in zip(("cos", "sin"), rope.angles(c.rope, known, known + 1), strict=True):
                self.register_buffer(name, torch.from_numpy(table).to(seen.device, torch.get_default_dtype()))

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """int64 [T] both -> logits of the last row, [1, vocab_size]."""
        mask = self.mask[..., positions, :]
        angles = (self.cos[positions], self.sin[positions]) if self.config.rope.dim else None
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, positions, angles, mask)
        return self.head(self.norm(x[-1:]))


def norm(config: ModelConfig) -> nn.Module:
    """Of rows."""
    if config.norm is Norm.RMS:
        return nn.RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary halves of [T, heads, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def decode_step(model: Plain) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(token [1], position [1]) -> the likeliest next token [1]: what is compiled or captured."""

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return model(token, position).argmax(-1)

    return step
