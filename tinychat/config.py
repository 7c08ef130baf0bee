"""ModelConfig: a frozen description of a decoder. Data, not code.

It is made from Hugging Face's `config.json` by one translator per family (`tinychat/architectures/`) and read by the
loader, the quantizer, the PyTorch decoder and the lowered C++ decoder; none of them ever asks for a model's name.
Exclusive choices are enums; every field is used by a family that ships and has a test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Activation(Enum):
    """The MLP. `SILU` is gated: down(silu(gate(x)) * up(x)); `GELU` is not: down(gelu(up(x))), gelu by erf."""

    SILU = "silu"
    GELU = "gelu"


class Norm(Enum):
    """What is applied to rows before a linear: x / rms(x), or (x - mean(x)) / std(x); then a weight, perhaps a bias."""

    RMS = "rms"
    LAYER = "layer"


class Block(Enum):
    """What attention and MLP of a block read.

    SEQUENTIAL         x += attention(norm1(x)), then x += mlp(norm2(x))
    PARALLEL           x += attention(norm1(x)) + mlp(norm2(x))
    PARALLEL_ONE_NORM  the same, and norm2 is norm1
    """

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"
    PARALLEL_ONE_NORM = "parallel, one norm"


class RopeScaling(Enum):
    """How rotary frequencies are stretched past the trained context; `rope.py` has the formulas."""

    NONE = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    YARN = "yarn"
    LLAMA3 = "llama3"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864), rotating halves: dimension j pairs with j + dim/2.

    The scaling parameters keep Hugging Face's names and meaning; those a scaling does not use stay at their default.
    """

    theta: float = 10000.0
    dim: int = 0  # rotated dimensions of each head
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_max_positions: int = 0  # dynamic, yarn, llama3: the context before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn, DeepSeek's spelling; 0: absent
    mscale_all_dim: float = 0.0  # yarn, likewise
    attention_factor: float | None = None  # yarn; None: derived from factor
    truncate: bool = True  # yarn: round the correction range to whole dimensions


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
    """A decoder-only transformer of pre-norm blocks: grouped-query attention and an MLP."""

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
    rope: Rope
    activation: Activation = Activation.SILU
    norm: Norm = Norm.RMS
    norm_bias: bool = False  # norms of rows have a bias
    block: Block = Block.SEQUENTIAL
    slopes: tuple[
        float, ...
    ] = ()  # [n_heads] of ALiBi (arXiv 2108.12409): slope * distance is taken from q . k / sqrt(d)
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 before it
    windowed_layers: frozenset[int] = field(default_factory=frozenset)  # layers to which the window applies
    qk_norm: bool = False  # RMSNorm over head_dim on each head of q and k, before rotary
    biases: frozenset[str] = field(default_factory=frozenset)  # canonical linears that have a bias: qkv, out, up, down
    experts: Experts | None = None  # in place of the MLP of some layers
    tied_head: bool = False  # the output head is the embedding table
    dtype: str = "float16"  # of the unquantized weights, as the config states it

    @property
    def gated(self) -> bool:
        """Whether `up` is gate | up."""
        return self.activation is Activation.SILU

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

    def window(self, layer: int) -> int:
        """Positions visible to a token of `layer`, itself included; 0 means all."""
        return self.sliding_window if self.sliding_window and layer in self.windowed_layers else 0

    def kv_bytes(self, ctx_size: int, itemsize: int = 2) -> int:
        """Bytes of the KV cache of one slot of `ctx_size` positions; numbers of a byte have an fp32 scale per head."""
        entry = self.head_dim * itemsize + (4 if itemsize == 1 else 0)
        return 2 * self.n_layers * self.n_kv_heads * ctx_size * entry
