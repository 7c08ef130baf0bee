"""ALiBi: attention with linear biases in place of position embeddings (arXiv 2108.12409).

A head takes slope * distance from its scores. The paper gives slopes for a power of two of heads; families differ in
what they do for other numbers, and models are tied to what they were trained with.
"""

from __future__ import annotations


def geometric(n: int, bias_max: float = 8.0) -> list[float]:
    """2 ** (-bias_max * i / n) for i = 1 .. n: the paper's, for n a power of two."""
    return [2.0 ** (-bias_max * i / n) for i in range(1, n + 1)]


def every_second_first(n_heads: int, bias_max: float) -> tuple[float, ...]:
    """Of the next power of two, the slopes of even rank, then those of odd rank, as many as there are heads (MPT)."""
    power = 1 << (n_heads - 1).bit_length()
    slopes = geometric(power, bias_max)
    return tuple(slopes if power == n_heads else (slopes[1::2] + slopes[::2])[:n_heads])


def filled_up(n_heads: int) -> tuple[float, ...]:
    """Those of the last power of two, then those of odd rank of the next one (BLOOM, Falcon)."""
    power = 1 << (n_heads.bit_length() - 1)
    return tuple((geometric(power) + geometric(2 * power)[::2])[:n_heads])
