"""The step contract: rows in, a preallocated KV cache that they read and extend.

A step takes T rows; each has a token id (or an embedding vector), a position and a cache slot; it returns logits for
the rows asked for. A prefill chunk, a decoded token, several chats at once, the verification of a draft and image
embeddings are all this one call, the same in PyTorch and in C++.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Rows:
    """The input of one step.

    tokens     int32 [T], or None where `embeddings` is given
    positions  int32 [T]
    slots      int32 [T]
    wanted     int32 [R]: the rows whose logits are returned, in this order
    embeddings fp32 [T, hidden_size], or None
    """

    tokens: np.ndarray | None
    positions: np.ndarray
    slots: np.ndarray
    wanted: np.ndarray
    embeddings: np.ndarray | None = None

    @staticmethod
    def of(tokens: list[int] | np.ndarray, start: int, slot: int = 0, wanted: str = "last") -> Rows:
        """Consecutive tokens of one slot from position `start`; `wanted` is 'last', 'all' or 'none'."""
        count = len(tokens)
        first = 0 if wanted == "all" else count - 1 if wanted == "last" else count
        return Rows(
            np.array(tokens, np.int32),
            np.arange(start, start + count, dtype=np.int32),
            np.array([slot] * count, np.int32),
            np.arange(first, count, dtype=np.int32),
        )

    def __len__(self) -> int:
        return len(self.positions)


KV_DTYPES = {"fp16": np.float16, "fp32": np.float32, "int8": np.int8}


def kv_itemsize(kv_dtype: str) -> int:
    """Bytes of one number in a cache of `kv_dtype`."""
    return np.dtype(KV_DTYPES[kv_dtype]).itemsize


def quantize_entries(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [..., head_dim] as the int8 cache holds it: codes int8 [..., head_dim], scales fp32 [...].

    scale = max|x| / 127, code = x / scale to nearest, ties to even; an entry of zeros has scale 0, one with NaN or
    infinity a scale of NaN.
    """
    with np.errstate(invalid="ignore"):
        scales = np.abs(x).max(-1) / np.float32(127) + (0 * x).sum(-1)
        codes = np.divide(x, scales[..., None], out=np.zeros_like(x), where=scales[..., None] > 0)
    return np.clip(np.rint(codes), -127, 127).astype(np.int8), scales


def dequantize_entries(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x = code * scale, fp32 [..., head_dim]."""
    return codes * scales[..., None]


class KVCache:
    """Keys (rotated) and values of every layer and slot, allocated once.

    keys, values              [n_layers, n_slots, n_kv_heads, capacity, head_dim] in fp16, fp32, or int8 codes (see
                              `quantize_entries`); entry j of a slot is position j
    key_scales, value_scales  fp32 [n_layers, n_slots, n_kv_heads, capacity] of int8, else None
    lengths                   int32 [n_slots]: positions filled
    kv_dtype                  the name of what entries are kept in: fp16, fp32, int8
    """

    def __init__(self, n_layers: int, n_slots: int, n_kv_heads: int, capacity: int, head_dim: int, dtype: str = "fp16"):
        self.kv_dtype = dtype
        self.dtype: np.dtype = np.dtype(KV_DTYPES[dtype])
        shape = (n_layers, n_slots, n_kv_heads, capacity, head_dim)
        self.keys = self.zeros(shape, self.dtype)
        self.values = self.zeros(shape, self.dtype)
        scaled = self.dtype == np.int8
        self.key_scales = self.zeros(shape[:-1], np.dtype(np.float32)) if scaled else None
        self.value_scales = self.zeros(shape[:-1], np.dtype(np.float32)) if scaled else None
        self.lengths = np.zeros(n_slots, np.int32)
        self.capacity = capacity
        self.n_slots = n_slots

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """What keys, values and scales are held in: numpy arrays here; a device has its own."""
        return np.zeros(shape, dtype)

    def given(self, entries: np.ndarray) -> Any:
        """Numbers of the cache's dtype as they can be assigned to a part of `keys` or `values`."""
        return entries

    def check(self, rows: Rows) -> np.ndarray:
        """The lengths after `rows`, int32 [n_slots]. Raises ValueError where a slot's rows do not continue it.

        Within a step a slot's rows come in order and their positions start at the slot's length.
        """
        lengths, longest = self.lengths.copy(), 0
        for slot, position in zip(rows.slots.tolist(), rows.positions.tolist(), strict=True):
            if not 0 <= slot < self.n_slots:
                raise ValueError(f"slot {slot} of a cache of {self.n_slots}")
            if position != lengths[slot]:
                raise ValueError(f"slot {slot} holds {lengths[slot]} positions; a row continues it at {position}")
            lengths[slot] = position + 1
            longest = max(longest, position + 1)
        if longest > self.capacity:
            raise ValueError(f"{longest} positions in a cache of {self.capacity}")
        return lengths

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions of `slot` from `length` on."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"slot {slot} holds {self.lengths[slot]} positions; cannot be cut to {length}")
        self.lengths[slot] = length

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds."""
        length = self.lengths[source]
        for array in (self.keys, self.values, self.key_scales, self.value_scales):
            if array is not None:
                array[:, target, :, :length] = array[:, source, :, :length]
        self.lengths[target] = length
