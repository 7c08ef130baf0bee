"""The rows of a fused qkv that a file keeps together by key-value head: its queries, its key, its value.

The canonical order is all queries, all keys, all values. Rows move in whole heads, which in AWQ's words are columns.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tinychat.checkpoint.awq import PER_WORD
from tinychat.config import ModelConfig
from tinychat.qtensor import AwqWords, QTensor, StoredCodes, Weight
from tinychat.weights import Linear


def apart(linear: Linear, config: ModelConfig) -> Linear:
    """A qkv of one segment as a file has it, in canonical order."""
    return _reordered(linear, _order(config), config.head_dim)


def together(linear: Linear, config: ModelConfig) -> Linear:
    """The inverse of `apart`."""
    return _reordered(linear, np.argsort(_order(config)), config.head_dim)


def _order(config: ModelConfig) -> np.ndarray:
    """For each head of the canonical order its place in the file."""
    group = config.n_heads // config.n_kv_heads
    places = np.arange(config.n_kv_heads * (group + 2)).reshape(-1, group + 2)
    return np.concatenate([places[:, :group].ravel(), places[:, group], places[:, group + 1]])


def _reordered(linear: Linear, order: np.ndarray, head_dim: int) -> Linear:
    if np.array_equal(order, np.arange(len(order))):  # one key-value head
        return linear
    (weight,) = linear.segments
    bias = None if linear.bias is None else _moved(linear.bias, order, head_dim)
    return Linear((_weight(weight, order, head_dim),), bias)


def _weight(weight: Weight, order: np.ndarray, head_dim: int) -> Weight:
    if isinstance(weight, AwqWords):
        words = head_dim // PER_WORD
        return AwqWords(
            _columns(weight.qweight, order, words),
            _columns(weight.qzeros, order, words),
            _columns(weight.scales, order, head_dim),
        )
    if isinstance(weight, StoredCodes):
        return weight.rows(_moved(np.arange(weight.shape[0]), order, head_dim))
    if isinstance(weight, QTensor):
        codes, scales, zeros = (_moved(array, order, head_dim) for array in (weight.codes, weight.scales, weight.zeros))
        return replace(weight, codes=codes, scales=scales, zeros=zeros)
    return _moved(weight, order, head_dim)


def _moved(array: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """Blocks of `size` along the first axis, in another order."""
    return array.reshape(len(order), size, *array.shape[1:])[order].reshape(array.shape)


def _columns(array: np.ndarray, order: np.ndarray, size: int) -> np.ndarray:
    """The same along the second axis."""
    return array.reshape(len(array), len(order), size)[:, order].reshape(array.shape)
