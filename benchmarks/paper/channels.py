"""Weights whose channels are treated one by one, as in the paper's sections 3.1 and 3.2: mixed precision and scaling.

Simulated: a rounded weight is a 16-bit float that lies where its code would put it, so that channels of 16 bits and
channels scaled before they are rounded run like any other weight. The quantizer here is written from the paper's
equation 1 and from its code, apart from the product's, and rounds its scales to fp16 as that does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tinychat.backends.reference import TorchOps
from tinychat.cache import KVCache, Rows
from tinychat.decoder import Decoder
from tinychat.weights import LINEARS, Layer, Linear, WeightSource

# (layer, canonical linear, segment, weight fp32 [N, K]) -> another weight [N, K]
Change = Callable[[int, str, int, np.ndarray], np.ndarray]
Magnitudes = Sequence[dict[str, np.ndarray]]  # of each layer, mean |x| of each linear's channels [K]


@dataclass(frozen=True)
class Quantizer:
    """w -> delta * round(w / delta), a delta for each `group_size` inputs of a row (a shorter one at its end).

    symmetric   equation 1: delta = max|w| / 2^(bits - 1)
    asymmetric  the code: delta = (max - min) / (2^bits - 1), and an integer zero point
    """

    bits: int
    group_size: int
    symmetric: bool = False

    def __call__(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the rounded weight [N, K], delta [N, groups] before it is rounded to fp16), fp32."""
        n, k = weight.shape
        width = k if self.group_size == -1 else min(self.group_size, k)
        short = -k % width  # filled with what is there, so that the last group keeps its range
        groups = np.concatenate([weight, np.repeat(weight[:, -1:], short, axis=1)], axis=1).reshape(n, -1, width)
        if self.symmetric:
            low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
            delta = np.abs(groups).max(-1, keepdims=True) / -low
            zero = np.zeros_like(delta)
        else:
            low, high = 0, 2**self.bits - 1
            bottom, top = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
            delta = (top - bottom) / high
        step = delta.astype(np.float16).astype(np.float32)
        step = np.where(step > 0, step, 1)
        if not self.symmetric:
            zero = np.clip(np.rint(-bottom / step), low, high)
        codes = np.clip(np.rint(groups / step) + zero, low, high)
        return ((codes - zero) * step).reshape(n, -1)[:, :k], delta[..., 0]


@dataclass(frozen=True)
class Changed:
    """A `WeightSource` whose linears, the head's excepted, went through `change`, a layer when it is asked for."""

    source: WeightSource
    change: Change

    def layer(self, index: int) -> Layer:
        """See `WeightSource`; weights are fp16."""
        layer = self.source.layer(index)
        return replace(layer, **{name: self._linear(index, name, getattr(layer, name)) for name in LINEARS})

    def _linear(self, index: int, name: str, linear: Linear) -> Linear:
        made = (
            self.change(index, name, i, np.asarray(segment, np.float32)).astype(np.float16)
            for i, segment in enumerate(linear.segments)
        )
        return Linear(tuple(made), linear.bias)

    def __getattr__(self, name: str):
        return getattr(self.source, name)


class _Watching(TorchOps):
    """The reference operations; sums |x| of what each packed linear is given."""

    def __init__(self) -> None:
        super().__init__()
        self.packed: list = []  # kept alive, so that an id stays one linear's
        self.sums: dict[int, torch.Tensor] = {}

    def pack(self, linear):
        """See `TorchOps`."""
        self.packed.append(super().pack(linear))
        return self.packed[-1]

    def linear(self, x, weight):
        """See `TorchOps`."""
        total = x.abs().sum(0, dtype=torch.float64)
        self.sums[id(weight)] = self.sums[id(weight)] + total if id(weight) in self.sums else total
        return super().linear(x, weight)


def magnitudes(source: WeightSource, sequences: Sequence[Sequence[int]]) -> Magnitudes:
    """Mean |x| of every linear's input channels over the sequences, each on its own, in the unquantized model."""
    config, ops = source.config, _Watching()
    cache = KVCache(config.n_layers, 1, config.n_kv_heads, max(map(len, sequences)), config.head_dim, "fp32")
    decoder = Decoder(source, ops, cache)
    for sequence in sequences:
        decoder.step(Rows.of(list(sequence), 0, wanted="none"))
        cache.truncate(0, 0)
    n_tokens = sum(map(len, sequences))
    means = [(ops.sums[id(packed)] / n_tokens).numpy() for packed in ops.packed if id(packed) in ops.sums]
    return [dict(zip(LINEARS, means[i : i + 4], strict=True)) for i in range(0, 4 * config.n_layers, 4)]


def salient(importance: np.ndarray, share: float) -> np.ndarray:
    """Indices of the most important channels: `share` of them, at least one."""
    n = max(1, round(share * len(importance)))
    return np.argsort(-importance, kind="stable")[:n]


def by_activation(found: Magnitudes, share: float) -> Callable[[int, str, int, np.ndarray], np.ndarray]:
    """Channels chosen by the mean magnitude of their activations."""
    return lambda index, name, i, weight: salient(found[index][name], share)


def by_weight(share: float) -> Callable[[int, str, int, np.ndarray], np.ndarray]:
    """Channels chosen by the L2 norm of their weights."""
    return lambda index, name, i, weight: salient(np.linalg.norm(weight, axis=0), share)


def at_random(share: float, seed: int) -> Callable[[int, str, int, np.ndarray], np.ndarray]:
    """Channels drawn, the same at every call."""

    def choose(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        generator = np.random.default_rng([seed, index, LINEARS.index(name), i])
        return salient(generator.random(weight.shape[1]), share)

    return choose


def rounded(quantizer: Quantizer) -> Change:
    """Every channel rounded."""
    return lambda index, name, i, weight: quantizer(weight)[0]


def mixed(quantizer: Quantizer, choose: Callable[[int, str, int, np.ndarray], np.ndarray]) -> Change:
    """All channels rounded in their groups, then the chosen ones put back as they were."""

    def change(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        kept = choose(index, name, i, weight)
        made = quantizer(weight)[0]
        made[:, kept] = weight[:, kept]
        return made

    return change


def scaled(quantizer: Quantizer, choose: Callable[[int, str, int, np.ndarray], np.ndarray], s: float) -> Change:
    """The chosen channels multiplied by s, all rounded, and those divided by s again: equation 2."""

    def change(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        factors = np.ones(weight.shape[1], np.float32)
        factors[choose(index, name, i, weight)] = s
        return quantizer(weight * factors)[0] / factors

    return change
