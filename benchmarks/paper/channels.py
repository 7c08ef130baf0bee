"""Weights whose channels are treated one by one, as in the paper's sections 3.1 and 3.2: mixed precision and scaling.

Simulated: a rounded weight is a 16-bit float that lies where its code would put it, so that channels of 16 bits and
channels scaled before they are rounded run like any other weight. The quantizer here is written from the paper's
equation 1 and from its code, apart from the product's, and rounds its scales to fp16 as that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tinychat.decoder import PackedLayer
from tinychat.quantize.activations import Activations
from tinychat.quantize.dense import dense_layer, linears_of
from tinychat.weights import QUANTIZED, Layer, Linear, WeightSource

# (layer, canonical linear, of expert 3 "up.3", segment, weight fp32 [N, K]) -> another weight [N, K]
Change = Callable[[int, str, int, np.ndarray], np.ndarray]
Choice = Callable[[int, str, int, np.ndarray], np.ndarray]  # of the same -> indices of channels
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
        made: dict[str, list[np.ndarray]] = {}
        for name, i, weight in weights(layer):
            made.setdefault(name.partition(".")[0], []).append(self.change(index, name, i, weight).astype(np.float16))
        return replace(layer, **{name: Linear(tuple(m), getattr(layer, name).bias) for name, m in made.items()})

    def __getattr__(self, name: str):
        return getattr(self.source, name)


def weights(layer: Layer) -> Iterator[tuple[str, int, np.ndarray]]:
    """(canonical linear, segment, weight fp32 [N, K]) of all that a quantizer rounds in a layer."""
    for name, linear in linears_of(_dense(layer)).items():
        if linear.quantized:
            for i, part in enumerate(linear.parts()):
                yield name, i, part.weight.numpy()


def _dense(layer: Layer) -> PackedLayer:
    return dense_layer(layer, lambda name, i, shape: (name, None))


def magnitudes(source: WeightSource, sequences: Sequence[Sequence[int]]) -> Magnitudes:
    """Mean |x| of every linear's input channels over the sequences, each on its own, in the unquantized model.

    Of an expert those of the tokens that went to it; nothing of one that none went to.
    """
    activations = Activations(source.config, source.embed(), sequences, 0, ends=source.ends())
    found = []
    for index in range(source.config.n_layers):
        seen = activations.advance(_dense(source.layer(index)), index, samples=False).magnitude
        found.append({name: magnitude.numpy() for name, magnitude in seen.items()})
    return found


def salient(importance: np.ndarray, share: float) -> np.ndarray:
    """Indices of the most important channels: `share` of them, at least one."""
    n = max(1, round(share * len(importance)))
    return np.argsort(-importance, kind="stable")[:n]


def by_activation(found: Magnitudes, share: float) -> Choice:
    """Channels chosen by the mean magnitude of their activations; none where nothing is known of them."""

    def choose(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        return salient(found[index][name], share) if name in found[index] else np.zeros(0, np.intp)

    return choose


def by_weight(share: float) -> Choice:
    """Channels chosen by the L2 norm of their weights."""
    return lambda index, name, i, weight: salient(np.linalg.norm(weight, axis=0), share)


def at_random(share: float, seed: int) -> Choice:
    """Channels drawn, the same at every call."""

    def choose(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        name, _, expert = name.partition(".")
        generator = np.random.default_rng([seed, index, QUANTIZED.index(name), i, *([int(expert)] if expert else [])])
        return salient(generator.random(weight.shape[1]), share)

    return choose


def rounded(quantizer: Quantizer) -> Change:
    """Every channel rounded."""
    return lambda index, name, i, weight: quantizer(weight)[0]


def mixed(quantizer: Quantizer, choose: Choice) -> Change:
    """All channels rounded in their groups, then the chosen ones put back as they were."""

    def change(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        kept = choose(index, name, i, weight)
        made = quantizer(weight)[0]
        made[:, kept] = weight[:, kept]
        return made

    return change


def scaled(quantizer: Quantizer, choose: Choice, s: float) -> Change:
    """The chosen channels multiplied by s, all rounded, and those divided by s again: equation 2."""

    def change(index: int, name: str, i: int, weight: np.ndarray) -> np.ndarray:
        factors = np.ones(weight.shape[1], np.float32)
        factors[choose(index, name, i, weight)] = s
        return quantizer(weight * factors)[0] / factors

    return change
