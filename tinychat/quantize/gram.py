"""The Gram matrix of what a linear reads, x^T x over all tokens: it is symmetric, half of it is computed and kept."""

from __future__ import annotations

import torch

ROWS = 2048  # of a strip


class Gram:
    """A sum of x^T x, fp32, in strips of rows up to the end of the diagonal; over `n_tokens`."""

    def __init__(self) -> None:
        self.n_tokens = 0
        self._strips: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """x^T x, of x fp32 [T, K]."""
        self.n_tokens += len(x)
        k = x.shape[1]
        for i, begin in enumerate(range(0, k, ROWS)):
            rows, left = x[:, begin : begin + ROWS].T, x[:, : min(begin + ROWS, k)]
            if i == len(self._strips):
                self._strips.append(rows @ left)
            else:
                self._strips[i] += rows @ left

    def taken(self) -> torch.Tensor:
        """The whole matrix [K, K], once: the strips go while it is put together."""
        if len(self._strips) == 1:
            return self._strips.pop()
        k = self._strips[-1].shape[1]
        made = torch.empty(k, k)
        for begin in range(0, k, ROWS):
            strip = self._strips.pop(0)
            made[begin : begin + ROWS, : strip.shape[1]] = strip
            made[:begin, begin : begin + ROWS] = strip[:, :begin].T
        return made
