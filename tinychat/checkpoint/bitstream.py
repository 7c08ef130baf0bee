"""Codes of a few bits in 32-bit words: a stream that begins at the lowest bit, as GPTQ and compressed-tensors have it.

Code i of a row takes the bits i * bits .. (i + 1) * bits - 1 of the row's words, laid end to end. Two, four and eight
bits end at words; three do not, and 32 codes fill three words:

    word 0:  codes 0 .. 9, the lower two bits of code 10
    word 1:  its upper bit, codes 11 .. 20, the lowest bit of code 21
    word 2:  its upper two bits, codes 22 .. 31
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from tinychat.qtensor import StoredCodes

_PER_STEP = 8  # codes, which fill `bits` bytes whatever their width
_ROWS = 64  # at a time, so that the passes over a step find it in cache


def codes_per_unit(bits: int) -> int:
    """The fewest codes that fill whole words."""
    return 32 // math.gcd(32, bits)


def stream(
    words: np.ndarray,
    k: int,
    scales: np.ndarray,
    zeros: np.ndarray,
    bits: int,
    group_size: int,
    permutation: np.ndarray | None = None,
) -> StoredCodes:
    """A weight of K inputs whose codes are in `words`, int32 [N, C], perhaps strided; the rest as in a `QTensor`."""
    spread = partial(unpack_bits, bits=bits, n_codes=k)
    return StoredCodes(words, "stream", spread, k, scales, zeros, bits, group_size, permutation)


def unpack_bits(words: np.ndarray, bits: int, n_codes: int | None = None) -> np.ndarray:
    """int32 [R, C] -> the first `n_codes` (all that there are) of each row, uint8. `words` may be strided."""
    rows, n_words = words.shape
    n_codes = n_words * 32 // bits if n_codes is None else n_codes
    codes = np.empty((rows, n_codes), np.uint8)
    unit = codes_per_unit(bits) * bits // 32  # words
    for first in range(0, rows, _ROWS):
        source, out = np.ascontiguousarray(words[first : first + _ROWS], "<i4"), codes[first : first + _ROWS]
        if missing := -n_words % unit:
            source = np.pad(source, ((0, 0), (0, missing)))
        if bits == 8:
            out[...] = source.view(np.uint8)[:, :n_codes]
            continue
        steps = source.view(np.uint8).reshape(len(out), -1, bits)
        value = steps[..., 0].astype(np.uint32)
        for i in range(1, bits):
            value |= steps[..., i].astype(np.uint32) << 8 * i
        spread = np.empty((*value.shape, _PER_STEP), np.uint8)
        for j in range(_PER_STEP):
            spread[..., j] = (value >> bits * j) & ((1 << bits) - 1)
        out[...] = spread.reshape(len(out), -1)[:, :n_codes]
    return codes


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [R, C], each below 2**bits, C a multiple of `codes_per_unit` -> int32 [R, C * bits / 32]."""
    rows, columns = codes.shape
    packed = np.empty((rows, columns * bits // 8), np.uint8)
    for first in range(0, rows, _ROWS):
        block = codes[first : first + _ROWS]
        if bits == 8:
            packed[first : first + _ROWS] = block
            continue
        steps = block.reshape(len(block), -1, _PER_STEP)
        value = np.zeros(steps.shape[:2], np.uint32)
        for j in range(_PER_STEP):
            value |= steps[..., j].astype(np.uint32) << bits * j
        out = packed[first : first + _ROWS].reshape(len(block), -1, bits)
        for i in range(bits):
            out[..., i] = (value >> 8 * i) & 255
    return packed.view("<i4")
