"""ModelConfig: a frozen description of a decoder. Data, not code.

It is made from Hugging Face's `config.json` by one translator per family (`tinychat/architectures/`) and read by the
loader, the quantizer, the PyTorch decoder and the lowered C++ decoder; none of them ever asks for a model's name.
Exclusive choices are enums; every field is used by a family that ships and has a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Activation(Enum):
    """Of the MLP: x / (1 + e^-x); x (1 + erf(x / sqrt 2)) / 2; the same with erf by a tanh; the larger of x and 0."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class Norm(Enum):
    """What is applied to rows before a linear: x / rms(x), or (x - mean(x)) / std(x); then a weight, perhaps a bias."""

    RMS = "rms"
    LAYER = "layer"


class Block(Enum):
    """What attention and MLP of a block read, and where its norms stand.

    SEQUENTIAL         x += attention(norm1(x)), then x += mlp(norm2(x))
    PARALLEL           x += attention(norm1(x)) + mlp(norm2(x))
    PARALLEL_ONE_NORM  the same, and norm2 is norm1
    SANDWICH           x += out_norm(attention(norm1(x))), then x += down_norm(mlp(norm2(x)))
    NORM_AFTER         x += out_norm(attention(x)), then x += down_norm(mlp(x))
    POST_NORM          x = norm1(x + attention(x)), then x = norm2(x + mlp(x)); no final norm
    """

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PARALLEL_ONE_NORM = "parallel, one norm"
    SANDWICH = "sandwich"
    NORM_AFTER = "norm after"
    POST_NORM = "post-norm"

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP read the same x."""
        return self in (Block.PARALLEL, Block.PARALLEL_ONE_NORM)


class QKNorm(Enum):
    """Norms of queries and keys, before rotary: of each head, by one weight for all; of all heads together."""

    NONE = "none"
    HEAD = "head"
    WHOLE = "whole"


class RopeScaling(Enum):
    """How rotary frequencies are stretched past the trained context; `rope.py` has the formulas."""

    NONE = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"
    LONGROPE = "longrope"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), mostly rotating halves: dimension j pairs with j + dim/2.

    The scaling parameters keep Hugging Face's names and meaning; those a scaling does not use stay at their default.
    """

    theta: float = 10000.0
    dim: int = 0  # rotated dimensions of each head
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_max_positions: int = 0  # dynamic, yarn, llama3, longrope: the context before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn, DeepSeek's spelling; 0: absent
    mscale_all_dim: float = 0.0  # yarn, likewise
    attention_factor: float | None = None  # yarn, longrope; None: derived from factor
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: of each frequency, up to the context before stretching
    long_factors: tuple[float, ...] = ()  # longrope: likewise, beyond it
    interleaved: bool = False  # dimension 2j pairs with 2j + 1


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP (arXiv 2101.03961): a row goes through n_used of n_experts small MLPs.

    Their outputs are added, each times its probability: the softmax over all experts of the router's logits. Those of
    the highest are used. A shared expert takes every row, its output times the sigmoid of a logit of its own.
    """

    n_experts: int
    n_used: int
    intermediate_size: int  # of each expert
    layers: frozenset[int]  # that have them; the others have a plain MLP
    normalized: bool = True  # the probabilities of the used ones are divided by their sum
    shared_size: int = 0  # intermediate size of the shared expert; 0: there is none

    @property
    def router_size(self) -> int:
        """Logits of a row: of the experts, and of the shared one."""
        return self.n_experts + (1 if self.shared_size else 0)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: blocks of grouped-query attention and an MLP."""

    model_type: str  # for messages only
    vocab_size: int
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    rope: Rope  # dim 0: no rotary positions
    layer_ropes: tuple[Rope, ...] = ()  # [n_layers], where they are not all `rope`; dim 0: none in this layer
    # [n_heads] of ALiBi (arXiv 2108.12409): slope * distance is taken from q . k * attention_scale
    slopes: tuple[float, ...] = ()
    position_offset: int | None = None  # learned positions: the row of their table that position 0 has; None: none
    activation: Activation = Activation.SILU
    gated: bool = True  # the MLP is down(act(gate(x)) * up(x)), else down(act(up(x)))
    norm: Norm = Norm.RMS
    norm_bias: bool = False  # norms of rows have a bias
    norm_weight: bool = True  # and a weight, into which scales can be folded; else it is 1
    block: Block = Block.SEQUENTIAL
    qk_norm: QKNorm = QKNorm.NONE
    clip_qkv: float | None = None  # queries, keys and values are held within +-clip_qkv
    attention_scale: float | None = None  # of q . k; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # scores become cap * tanh(score / cap)
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    windowed_layers: frozenset[int] = field(default_factory=frozenset)  # layers to which the window applies
    residual_scale: float = 1.0  # of what attention and MLP add to x
    embed_size: int | None = None  # width of embedding and head, where linears lead from it to hidden_size and back
    embed_scale: float = 1.0  # of a token's embedding
    embed_norm: bool = False  # a norm of what enters the first block
    logit_scale: float = 1.0
    logit_cap: float | None = None  # logits become cap * tanh(logit / cap)
    experts: Experts | None = None  # in place of the MLP of some layers
    # canonical linears that have a bias: qkv, out, up, down, head
    biases: frozenset[str] = field(default_factory=frozenset)
    tied_head: bool = False  # the output head is the embedding table
    dtype: str = "float16"  # of the unquantized weights, as the config states it

    @property
    def table_width(self) -> int:
        """Columns of the embedding table and of the head."""
        return self.embed_size or self.hidden_size

    @property
    def score_scale(self) -> float:
        """Of q . k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings that layers have."""
        return tuple(dict.fromkeys(rope for rope in self.layer_ropes or (self.rope,) * self.n_layers if rope.dim))

    def rope_index(self, layer: int) -> int:
        """Which of `ropes` a layer has; -1: none."""
        rope = self.layer_ropes[layer] if self.layer_ropes else self.rope
        return self.ropes.index(rope) if rope.dim else -1

    @property
    def up_size(self) -> int:
        """Rows of `up`."""
        return (2 if self.gated else 1) * self.intermediate_size

    def experts_of(self, layer: int) -> Experts | None:
        """The experts of `layer`; None where its MLP is a plain one."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None

    def mlp_sizes(self, layer: int) -> dict[str, int]:
        """Weights of the MLP of `layer`, or of the parts of its mixture: 'router', 'shared', 'experts'."""
        of_one = (3 if self.gated else 2) * self.hidden_size
        experts = self.experts_of(layer)
        if experts is None:
            return {"mlp": of_one * self.intermediate_size}
        return {
            "router": experts.router_size * self.hidden_size,
            "shared": of_one * experts.shared_size,
            "experts": of_one * experts.intermediate_size * experts.n_experts,
        }

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.n_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_kv_heads * self.head_dim

    def check_capacity(self, ctx_size: int) -> None:
        """ValueError where a cache of `ctx_size` has positions that were never learned."""
        if self.position_offset is not None and ctx_size > self.max_positions:
            raise ValueError(f"a context of {ctx_size}; this model learned {self.max_positions} positions")

    def window(self, layer: int) -> int:
        """Positions visible to a token of `layer`, itself included; 0 means all."""
        return self.sliding_window if self.sliding_window and layer in self.windowed_layers else 0

    def kv_bytes(self, ctx_size: int, itemsize: int = 2) -> int:
        """Bytes of the KV cache of one slot of `ctx_size` positions; numbers of a byte have an fp32 scale per head."""
        entry = self.head_dim * itemsize + (4 if itemsize == 1 else 0)
        return 2 * self.n_layers * self.n_kv_heads * ctx_size * entry
