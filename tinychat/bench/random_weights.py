"""RandomWeights: a model of a given shape whose weights are random, made at once, for measurements.

Every matrix is a window of one random pool, each at another place: making one takes no time and no memory, and no two
are equal, so that nothing but the pool is held while a backend packs them one by one.

How large the numbers are keeps activations finite at any depth: a linear's output has about the size of its normalized
input, so that a residual stream to which every block adds its part grows like the square root of the depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from tinychat.architectures.names import TensorNames
from tinychat.checkpoint import awq
from tinychat.checkpoint.inventory import segments
from tinychat.checkpoint.vectors import ends
from tinychat.config import Block, ModelConfig
from tinychat.errors import UsageError
from tinychat.qtensor import AwqWords, QTensor, Weight
from tinychat.weights import QUANTIZED, Ends, Layer, Linear, linears, norm_sizes

PLACES = 1 << 20  # at which a window may begin
TABLE_POOL = PLACES + 7  # numbers that a table repeats: odd, so that its rows differ


class RandomWeights:
    """A `WeightSource` (see `tinychat.weights`) of `config`, its linears in `bits`, all else in fp16.

    group_size  of the quantized linears; None: nothing is quantized
    bits        of their codes; of 4 they are words as AWQ files hold them, else canonical tensors
    """

    def __init__(
        self, config: ModelConfig, names: TensorNames, group_size: int | None = 128, bits: int = 4, seed: int = 0
    ):
        self.config = config
        self.names = names
        self.group_size = group_size
        self.bits = bits
        self._rng = np.random.default_rng(seed)
        kinds = [config.experts_of(layer) is not None for layer in range(config.n_layers)]
        self._like = {kinds.index(kind): kinds.count(kind) for kind in set(kinds)}  # a layer: how many are as it is
        shapes = [shape for layer in self._like for name, shape in self._shapes(layer) if name != "router"]
        for shape in shapes:
            if group_size is not None and (reason := awq.fits(shape, group_size)):
                raise UsageError(f"a linear of {shape[0]} outputs and {shape[1]} inputs cannot be quantized: {reason}")
        self._largest = max(n * k for n, k in shapes)
        self._kept: np.ndarray | None = None
        self._std = 1 / math.sqrt(config.hidden_size)
        self._scales = lru_cache(maxsize=None)(self._make_scales)

    @cached_property
    def _pool(self) -> np.ndarray:
        """Made when a weight is asked for: to know sizes alone costs nothing."""
        if self.group_size is None:
            return self._normal(self._largest + PLACES)
        if self.bits == 4:
            return np.frombuffer(self._rng.bytes(4 * (self._largest // awq.PER_WORD + PLACES)), np.int32)
        return np.frombuffer(self._rng.bytes(self._largest + PLACES), np.uint8) >> 8 - self.bits

    @property
    def table_bytes(self) -> int:
        """Of the embedding table, in fp16."""
        return self.config.vocab_size * self.config.table_width * 2

    def embed(self) -> np.ndarray:
        """See `WeightSource`. Of an untied model one array is embedding and head: a backend keeps the first and packs
        the second, so that the source of the head takes no memory of its own, as that in a file would not. A tied one
        is made anew at each call: it need not stay beside its packed form."""
        if self.config.tied_head:
            return self._table()
        if self._kept is None:
            self._kept = self._table()
        return self._kept

    def layer(self, index: int) -> Layer:
        """See `WeightSource`."""
        c = self.config
        made: dict[str, Any] = {name: self._linear(name, index) for name in linears(c, index)}
        for name, size in norm_sizes(c).items():
            made[name] = (np.zeros if name.endswith("_bias") else np.ones)(size, np.float32)
        return Layer(**made)

    def ends(self) -> Ends:
        """See `WeightSource`."""
        c = self.config
        made: dict[str, Any] = {}
        if c.position_offset is not None:
            n = (c.position_offset + c.max_positions) * c.hidden_size
            made["positions"] = np.resize(self._normal(TABLE_POOL), n).reshape(-1, c.hidden_size)
        if c.embed_norm:
            made |= {"norm": self.norm(), "norm_bias": self.norm_bias()}
        if c.table_width != c.hidden_size:
            shapes = {"project_in": (c.hidden_size, c.table_width), "project_out": (c.table_width, c.hidden_size)}
            made |= {name: Linear((self._normal(n * k).reshape(n, k),)) for name, (n, k) in shapes.items()}
        return Ends(**made)

    def norm(self) -> np.ndarray | None:
        """See `WeightSource`."""
        return None if self.config.block is Block.POST_NORM else np.ones(self.config.hidden_size, np.float32)

    def norm_bias(self) -> np.ndarray | None:
        """See `WeightSource`."""
        there = self.config.norm_bias and self.config.block is not Block.POST_NORM
        return np.zeros(self.config.hidden_size, np.float32) if there else None

    def head(self) -> Linear | None:
        """See `WeightSource`, and `embed`."""
        return None if self.config.tied_head else Linear((self.embed(),))

    def release(self) -> None:
        """See `WeightSource`: nothing is kept but the pool, which the next layer needs."""

    @property
    def n_quantized(self) -> int:
        """Weights of `bits`."""
        return 0 if self.group_size is None else self._of_all(self._in_quantized)

    @property
    def n_parameters(self) -> int:
        """Of the model; a tied head is not counted again."""
        c = self.config
        tables = c.vocab_size * c.table_width * (1 if c.tied_head else 2)
        others = sum(math.prod(shape) for _, shape in ends(c, self.names).values())
        return self._of_all(lambda layer: self._in_linears(layer) + self._in_vectors(layer)) + tables + others

    @property
    def file_bytes(self) -> int:
        """Of the tensors, were they in files."""
        return self.quantized_bytes + 2 * (self.n_parameters - self.n_quantized)

    @property
    def quantized_bytes(self) -> int:
        """Of the quantized linears, were they in files."""
        return 0 if self.group_size is None else self._of_all(lambda layer: self._bytes(layer, QUANTIZED))

    @property
    def expert_bytes(self) -> int:
        """Of all experts, were they in files; not of the shared ones."""
        sparse = self.config.experts.layers if self.config.experts else ()
        return self._of_all(lambda layer: self._bytes(layer, ("up", "down")) if layer in sparse else 0)

    def _of_all(self, size: Callable[[int], int]) -> int:
        """size(layer), summed over all layers."""
        return sum(size(layer) * count for layer, count in self._like.items())

    def _shapes(self, layer: int) -> list[tuple[str, tuple[int, int]]]:
        """Of every segment of a block: its canonical linear, and (N, K)."""
        names = linears(self.config, layer)
        return [(name, part.shape) for name in names for part in segments(self.config, self.names, name, layer)]

    def _bytes(self, layer: int, names: Collection[str]) -> int:
        bits = 16 if self.group_size is None else self.bits + (16 + self.bits) / self.group_size
        return sum(math.ceil(bits * math.prod(shape) / 8) for name, shape in self._shapes(layer) if name in names)

    def _in_linears(self, layer: int) -> int:
        """Weights in a block."""
        return sum(math.prod(shape) for _, shape in self._shapes(layer))

    def _in_quantized(self, layer: int) -> int:
        return sum(math.prod(shape) for name, shape in self._shapes(layer) if name in QUANTIZED)

    def _in_vectors(self, layer: int) -> int:
        """Norms and biases in a block."""
        biases = (shape[0] for name, shape in self._shapes(layer) if name in self.config.biases)
        return sum(norm_sizes(self.config).values()) + sum(biases)

    def _linear(self, name: str, index: int) -> Linear:
        parts = segments(self.config, self.names, name, index)
        bias = None
        if name in self.config.biases:
            bias = self._normal(sum(part.shape[0] for part in parts)).astype(np.float32)
        if name not in QUANTIZED:
            return Linear(tuple(self._normal(math.prod(part.shape)).reshape(part.shape) for part in parts), bias)
        return Linear(tuple(self._weight(*part.shape) for part in parts), bias)

    def _weight(self, n: int, k: int) -> Weight:
        if self.group_size is None:
            return self._window(n, k)
        groups, words = k // self.group_size, n // awq.PER_WORD
        if self.bits != 4:
            scales = self._scales(n, groups, k)
            return QTensor(self._window(n, k), scales, self._window(n, groups), self.bits, self.group_size)
        return AwqWords(self._window(k, words), self._window(groups, words), self._scales(groups, n, k))

    def _make_scales(self, rows: int, columns: int, k: int) -> np.ndarray:
        around = self._rng.uniform(0.5, 1.5, rows * columns).reshape(rows, columns)
        code_std = math.sqrt(2 * (4**self.bits - 1) / 12)  # of q - z, both uniform
        return (around / code_std / math.sqrt(k)).astype(np.float16)

    def _window(self, rows: int, columns: int) -> np.ndarray:
        place = int(self._rng.integers(PLACES))
        return self._pool[place : place + rows * columns].reshape(rows, columns)

    def _normal(self, size: int) -> np.ndarray:
        return (self._rng.standard_normal(size, np.float32) * np.float32(self._std)).astype(np.float16)

    def _table(self) -> np.ndarray:
        c = self.config
        table = np.resize(self._normal(TABLE_POOL), (c.vocab_size, c.table_width))
        table.flags.writeable = False  # as of a mapped file: a backend may keep it instead of a copy
        return table
