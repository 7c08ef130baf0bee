"""Rotary position embedding: the angles of every position, under each way of stretching the context.

Every decoder takes its cosines and sines from here, so that the formulas exist once. They follow what the checkpoints
were trained with, float32 where Hugging Face's transformers has float32: at position 100,000 the last bit of a
frequency is worth 0.006 radians. Sources: rotary embedding arXiv 2104.09864; position interpolation arXiv 2306.15595;
YaRN arXiv 2309.00071; the dynamic and Llama 3 scalings have no paper and are defined by their code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tinychat.config import Rope, RopeScaling

F32 = np.float32


def inv_freq(rope: Rope, seq_len: int) -> tuple[np.ndarray, float]:
    """(radians per position, fp32 [rope.dim / 2]; the factor on cosines and sines), for a sequence of `seq_len`.

    Only `DYNAMIC` and `LONGROPE` look at `seq_len`. The array is shared between calls and read-only.
    """
    if rope.scaling is RopeScaling.DYNAMIC and seq_len > rope.original_max_positions:
        return _frequencies(_dynamic_theta(rope, seq_len), rope.dim), 1.0
    if rope.scaling is RopeScaling.LONGROPE:
        return _longrope(rope, seq_len > rope.original_max_positions)
    return _static(rope)


def angles(rope: Rope, positions: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, fp32 [T, rope.dim / 2] each, attention factor included.

    positions  int32 [T]
    seq_lens   int32 [T]: for each row the length of its slot after this step, as `KVCache.check` returns it
    """
    lengths, which = np.unique(seq_lens, return_inverse=True)
    frequencies = np.array([inv_freq(rope, int(length))[0] for length in lengths], F32).reshape(
        len(lengths), rope.dim // 2
    )
    radians = positions.astype(F32)[:, None] * frequencies[which]
    scale = F32(inv_freq(rope, 0)[1])
    return np.cos(radians) * scale, np.sin(radians) * scale


class Table:
    """Cosines and sines by position, computed once: what a step needs for each row, without computing it at each step.

    Where angles depend on the length of a sequence too (`DYNAMIC`, `LONGROPE`), it reaches as far as they do not.
    """

    def __init__(self, rope: Rope, capacity: int):
        """For positions below `capacity`; computed as far as they are asked for."""
        self._rope = rope
        by_length = rope.scaling in (RopeScaling.DYNAMIC, RopeScaling.LONGROPE)
        self._end = min(capacity, rope.original_max_positions) if by_length else capacity
        self._cos = self._sin = np.zeros((0, rope.dim // 2), F32)

    def rows(self, positions: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `angles` returns."""
        one = len(positions) == 1
        last = int(seq_lens[0]) if one else int(seq_lens.max(initial=0))
        if last > self._end:
            return angles(self._rope, positions, seq_lens)
        if last > len(self._cos):
            known = np.arange(min(self._end, max(2 * last, 512)), dtype=np.int32)
            self._cos, self._sin = angles(self._rope, known, known + 1)
        if one:
            at = int(positions[0])
            return self._cos[at : at + 1], self._sin[at : at + 1]
        return self._cos[positions], self._sin[positions]


class Tables:
    """The tables of several rotary embeddings together."""

    def __init__(self, ropes: Sequence[Rope], capacity: int):
        """See `Table`."""
        self._tables = [Table(rope, capacity) for rope in ropes]

    def rows(self, positions: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `angles` returns, of each: [tables, T, dim / 2] both."""
        if len(self._tables) == 1:
            cos, sin = self._tables[0].rows(positions, seq_lens)
            return cos[None], sin[None]
        found = [table.rows(positions, seq_lens) for table in self._tables]
        if not found:
            none = np.zeros((0, len(positions), 0), F32)
            return none, none
        return np.stack([cos for cos, _ in found]), np.stack([sin for _, sin in found])


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """theta ** (-2j / dim) for each j; the power is rounded once, from float64: numpy's in float32 is a bit off."""
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    return F32(1) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(F32)


def _dynamic_theta(rope: Rope, seq_len: int) -> float:
    """NTK-aware: the base that stretches the slowest dimension to `seq_len`, and leaves the fastest as it is."""
    stretch = F32(F32(rope.factor * seq_len) / F32(rope.original_max_positions)) - F32(rope.factor - 1)
    return float(F32(rope.theta) * F32(np.power(np.float64(stretch), rope.dim / (rope.dim - 2))))


@lru_cache(maxsize=64)
def _static(rope: Rope) -> tuple[np.ndarray, float]:
    frequencies, scale = _frequencies(rope.theta, rope.dim), 1.0
    if rope.scaling is RopeScaling.LINEAR:
        frequencies = frequencies / F32(rope.factor)
    elif rope.scaling is RopeScaling.LLAMA3:
        frequencies = _llama3(rope, frequencies)
    elif rope.scaling is RopeScaling.YARN:
        frequencies, scale = _yarn(rope, frequencies), _yarn_attention_factor(rope)
    frequencies.flags.writeable = False
    return frequencies, scale


@lru_cache(maxsize=64)
def _longrope(rope: Rope, beyond: bool) -> tuple[np.ndarray, float]:
    """A factor for each frequency, others beyond the trained context (arXiv 2402.13753), and a temperature."""
    factors = np.array(rope.long_factors if beyond else rope.short_factors, F32)
    frequencies = F32(1) / (factors * (F32(1) / _frequencies(rope.theta, rope.dim)))
    frequencies.flags.writeable = False
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    grown = math.log(max(rope.factor, 1.0)) / math.log(rope.original_max_positions)
    return frequencies, math.sqrt(1 + grown)


def _llama3(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Slow dimensions are interpolated, fast ones kept, those between blended by their wavelength."""
    wavelengths = F32(2 * math.pi) / frequencies
    slow = wavelengths > F32(rope.original_max_positions / rope.low_freq_factor)
    fast = wavelengths < F32(rope.original_max_positions / rope.high_freq_factor)
    kept = (F32(rope.original_max_positions) / wavelengths - F32(rope.low_freq_factor)) / F32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (F32(1) - kept) * frequencies / F32(rope.factor) + kept * frequencies
    return np.where(slow, frequencies / F32(rope.factor), np.where(fast, frequencies, blended)).astype(F32)


def _yarn(rope: Rope, frequencies: np.ndarray) -> np.ndarray:
    """Dimensions that turn more than `beta_fast` times in the trained context are kept, fewer than `beta_slow`
    interpolated, and a linear ramp over the dimensions lies between (section 3.2 of the paper)."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, rope.dim - 1.0)
    if low == high:
        high += 0.001  # as the models were trained: no division by zero
    ramp = np.clip((np.arange(rope.dim // 2, dtype=F32) - F32(low)) / F32(high - low), F32(0), F32(1))
    kept = F32(1) - ramp
    interpolated = F32(1) / (F32(rope.factor) * (F32(1) / frequencies))
    return interpolated * (F32(1) - kept) + frequencies * kept


def _yarn_attention_factor(rope: Rope) -> float:
    """The temperature of the softmax, as a factor on both q and k (equation 22 of the paper)."""

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
