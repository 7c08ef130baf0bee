"""QTensor: the canonical group-quantized tensor, w = (q - z) * s, in device-neutral numpy arrays.

It is what the quantizer makes and what one computes with. File layouts and device layouts (`csrc/`) are permutations of
the same numbers, and `unpack(pack(q)) == q` for each. Those of checkpoints have classes here, `AwqWords` and
`StoredCodes`, so that a device may be given the mapped file and need not have the codes spread out first.

The words of the AWQ "gemm" layout: word c of a row holds the outputs 8c .. 8c+7, nibble i (bits 4i .. 4i+3) the output
8c + AWQ_ORDER[i]:

    bits    31-28 27-24 23-20 19-16 15-12 11-8   7-4   3-0
    output   8c+7  8c+5  8c+3  8c+1  8c+6  8c+4  8c+2  8c
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

bfloat16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), bfloat16)

HEAD_GROUP = 128  # along K, of an output head that is rounded
_ROUNDED_ROWS = 1024  # at a time: never a copy of the whole in fp32

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PER_WORD = 8
# A word's four bytes hold two nibbles each: the low one is output AWQ_ORDER[2j], the high one AWQ_ORDER[2j + 1].
_LOW, _HIGH = AWQ_ORDER[0::2], AWQ_ORDER[1::2]
# Transposing bytes is the work of both directions. In tiles of one cache line by this many inputs, each line
# that is fetched is used whole before it is evicted.
_TILE_WORDS = 16
_TILE_INPUTS = 1024


@dataclass(frozen=True, eq=False)
class QTensor:
    """A linear's weight of N outputs and K inputs, quantized in groups of `group_size` along K.

    codes   uint8 [N, K], each below 2**bits
    scales  fp16, bf16 or fp32 [N, ceil(K / group_size)]
    zeros   uint8 [N, ceil(K / group_size)], each below 2**bits
    permutation  int32 [K], or None for inputs in their own order: column j of `codes` multiplies input permutation[j].
                 It is what GPTQ's act-order leaves: groups gather inputs of like magnitude, wherever they are

    The last group is shorter where group_size does not divide K; group_size == K is one group per row.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    permutation: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.codes.dtype != np.uint8 or self.codes.ndim != 2:
            raise TypeError(f"codes are uint8 [N, K], not {self.codes.dtype} {list(self.codes.shape)}")
        _check_groups(self.shape, self.scales, self.zeros, self.group_size)
        _check_permutation(self.permutation, self.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the float weight's."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero, in bits, for one weight."""
        return _bits_per_weight(self)

    def dequantize(self, dtype: type | np.dtype = np.float32) -> np.ndarray:
        """The weight [N, K], inputs in their own order: w = (q - z) * s, computed in fp32 (fp64 where `dtype` is)."""
        work = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        n, k = self.shape
        groups, size = self.scales.shape[1], min(self.group_size, k)
        codes = self.codes
        if missing := groups * size - k:
            codes = np.pad(codes, ((0, 0), (0, missing)))
        weight = codes.reshape(n, groups, size).astype(work)
        weight -= self.zeros[..., None].astype(work)
        weight *= self.scales[..., None].astype(work)
        weight = np.ascontiguousarray(weight.reshape(n, groups * size)[:, :k], dtype)
        return weight if self.permutation is None else np.take(weight, np.argsort(self.permutation), axis=1)


@dataclass(frozen=True, eq=False)
class AwqWords:
    """A linear's weight of N outputs and K inputs in groups of G inputs, as AWQ "gemm" files hold it.

    qweight  int32 [K, N/8]
    qzeros   int32 [K/G, N/8]
    scales   fp16, bf16 or fp32 [K/G, N]
    """

    qweight: np.ndarray
    qzeros: np.ndarray
    scales: np.ndarray

    def __post_init__(self) -> None:
        (k, words), groups = self.qweight.shape, self.scales.shape[0]
        found = f"qweight {self.qweight.shape}, qzeros {self.qzeros.shape} and scales {self.scales.shape}"
        if self.qweight.dtype != np.int32 or self.qzeros.dtype != np.int32 or self.scales.dtype not in FLOAT_DTYPES:
            raise TypeError(f"AwqWords of {self.qweight.dtype}, {self.qzeros.dtype}, {self.scales.dtype}")
        if self.scales.shape != (groups, 8 * words) or self.qzeros.shape != (groups, words) or not groups or k % groups:
            raise ValueError(f"{found} do not agree")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the float weight's."""
        return self.scales.shape[1], self.qweight.shape[0]

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4

    @property
    def group_size(self) -> int:
        """G, the inputs that share a scale."""
        return self.qweight.shape[0] // self.scales.shape[0]

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero, in bits, for one weight."""
        return self.bits + (self.scales.dtype.itemsize * 8 + self.bits) / self.group_size

    def tensor(self) -> QTensor:
        """The same numbers in the canonical form; a copy."""
        return QTensor(
            codes=unpack_words(self.qweight),
            scales=np.ascontiguousarray(self.scales.T),
            zeros=unpack_words(self.qzeros),
            bits=self.bits,
            group_size=self.group_size,
        )


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A linear's weight of N outputs and K inputs whose codes lie as a file has them; the rest is as in a `QTensor`.

    stored   what holds the codes of each output: a "stream" of bits in int32 [N, words], any strides, or blocks in
             uint8 [N, bytes]
    source   how it does, as csrc/kernels.h names it
    spread   what makes codes uint8 [N, K] of `stored`; with a permutation, which a stream may have, those of inputs in
             their own order
    """

    stored: np.ndarray
    source: str
    spread: Callable[[np.ndarray], np.ndarray]
    k: int
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    permutation: np.ndarray | None = None

    def __post_init__(self) -> None:
        stream = self.source == "stream"
        if self.stored.dtype != np.dtype("i4" if stream else "u1") or self.stored.ndim != 2:
            raise TypeError(f"codes in {self.stored.dtype} {list(self.stored.shape)}, of source {self.source!r}")
        if not stream and self.permutation is not None:
            raise ValueError(f"codes of source {self.source!r} in an order of their own")
        _check_groups(self.shape, self.scales, self.zeros, self.group_size)
        _check_permutation(self.permutation, self.k)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as the float weight's."""
        return len(self.stored), self.k

    @property
    def bits_per_weight(self) -> float:
        """Code, scale and zero, in bits, for one weight."""
        return _bits_per_weight(self)

    def rows(self, which: np.ndarray | slice) -> StoredCodes:
        """The outputs `which`, in that order; a copy, but of a slice."""
        return replace(self, stored=self.stored[which], scales=self.scales[which], zeros=self.zeros[which])

    def tensor(self) -> QTensor:
        """The same numbers in the canonical form; a copy."""
        codes, order = self.spread(self.stored), self.permutation
        codes = codes if order is None else np.take(codes, order, axis=1)
        return QTensor(codes, self.scales, self.zeros, self.bits, self.group_size, order)


Weight = QTensor | AwqWords | StoredCodes | np.ndarray  # [N, K]; an array is fp32, fp16 or bf16


def canonical(weight: Weight) -> QTensor | np.ndarray:
    """`weight` with its codes spread out, if it is quantized."""
    return weight.tensor() if isinstance(weight, AwqWords | StoredCodes) else weight


def _check_groups(shape: tuple[int, int], scales: np.ndarray, zeros: np.ndarray, group_size: int) -> None:
    (n, k), groups = shape, (shape[0], -(-shape[1] // group_size))
    if zeros.dtype != np.uint8 or scales.dtype not in FLOAT_DTYPES:
        raise TypeError(f"scales are floats of 16 or 32 bits and zeros uint8, not {scales.dtype} and {zeros.dtype}")
    if scales.shape != groups or zeros.shape != groups:
        raise ValueError(
            f"codes {(n, k)} in groups of {group_size} need scales and zeros {groups}; "
            f"found {scales.shape} and {zeros.shape}"
        )


def _check_permutation(order: np.ndarray | None, k: int) -> None:
    if order is not None and (
        order.dtype != np.int32 or order.shape != (k,) or not np.array_equal(np.sort(order), np.arange(k))
    ):
        raise ValueError(f"a permutation of {k} inputs is int32 and names each once; found {order.dtype} {order.shape}")


def _bits_per_weight(q: QTensor | StoredCodes) -> float:
    return q.bits + q.scales.shape[1] * (q.scales.dtype.itemsize * 8 + q.bits) / q.shape[1]


def round_symmetric(array: np.ndarray, bits: int = 8, group_size: int = HEAD_GROUP) -> QTensor:
    """fp32, fp16 or bf16 [N, K], finite, to the nearest of 2^bits - 1 levels about zero; fp16 scales, groups along K.

        most  = 2^(bits-1) - 1
        scale = the least fp16 >= max |w| of the group / most, or fp16's largest where there is none; 0 of zeros alone
        code  = clip(rint(w / scale), -most, most) + most + 1, computed in fp32

    A scale that is rounded up cuts off no weight. Device packers compute the same, bit by bit.
    """
    n, k = array.shape
    most = (1 << bits - 1) - 1
    starts = range(0, k, group_size)
    scales = np.empty((n, len(starts)), np.float16)
    codes = np.empty((n, k), np.uint8)
    for first in range(0, n, _ROUNDED_ROWS):
        rows = slice(first, first + _ROUNDED_ROWS)
        for g, start in enumerate(starts):
            group = slice(start, start + group_size)
            values = array[rows, group].astype(np.float32)
            exact = np.abs(values).max(axis=1) / np.float32(most)
            scale = np.minimum(exact, np.float32(np.finfo(np.float16).max)).astype(np.float16)
            above = (scale.view(np.uint16) + np.uint16(1)).view(np.float16)  # the next one, or infinity
            scale = np.where((scale < exact) & np.isfinite(above), above, scale)
            scales[rows, g] = scale
            divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)
            integers = np.clip(np.rint(values / divisor[:, None]), -most, most)
            codes[rows, group] = (integers + (most + 1)).astype(np.uint8)
    return QTensor(codes, scales, np.full(scales.shape, most + 1, np.uint8), bits, group_size)


def unpack_words(words: np.ndarray) -> np.ndarray:
    """int32 [K, N/8] -> uint8 codes [N, K]."""
    k, n_words = words.shape
    source = np.ascontiguousarray(words).view(np.uint8)  # [K, N/2] bytes
    codes = np.empty((n_words, _PER_WORD, k), np.uint8)
    tile = np.empty((4 * _TILE_WORDS, _TILE_INPUTS), np.uint8)
    for c in range(0, n_words, _TILE_WORDS):
        n_tile = min(_TILE_WORDS, n_words - c)
        for start in range(0, k, _TILE_INPUTS):
            stop = min(start + _TILE_INPUTS, k)
            turned = tile[: 4 * n_tile, : stop - start]
            turned[...] = source[start:stop, 4 * c : 4 * (c + n_tile)].T
            pairs = turned.reshape(n_tile, 4, stop - start)  # byte j of each word, along the inputs
            out = codes[c : c + n_tile, :, start:stop]
            for j in range(4):
                np.bitwise_and(pairs[:, j], 15, out=out[:, _LOW[j]])
                np.right_shift(pairs[:, j], 4, out=out[:, _HIGH[j]])
    return codes.reshape(n_words * _PER_WORD, k)


def pack_words(codes: np.ndarray) -> np.ndarray:
    """uint8 codes [N, K] -> int32 [K, N/8]."""
    n, k = codes.shape
    outputs = codes.reshape(n // _PER_WORD, _PER_WORD, k)
    packed = np.empty((k, n // 2), np.uint8)
    for c in range(0, n // _PER_WORD, _TILE_WORDS):
        for start in range(0, k, _TILE_INPUTS):
            block = outputs[c : c + _TILE_WORDS, :, start : start + _TILE_INPUTS]
            pairs = block[:, _LOW] | block[:, _HIGH] << 4  # [words, 4, inputs]
            packed[start : start + _TILE_INPUTS, 4 * c : 4 * (c + len(block))] = pairs.reshape(-1, block.shape[2]).T
    return packed.view("<i4")
