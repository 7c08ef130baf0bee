"""How good a model is at predicting text: likelihoods, perplexity, and what a quantization costs, with its uncertainty.

Everything is measured through `Runner.step`, on any backend. A window is scored on its own; its first token is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.backends import Runner
from tinychat.cache import Rows

STEP_ROWS = 256


@dataclass(frozen=True, eq=False)
class Score:
    """Log-likelihoods of the predicted tokens, in nats, fp64; `lengths` of each window's part of them."""

    log_likelihoods: np.ndarray
    lengths: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(-float(self.log_likelihoods.mean()))


@dataclass(frozen=True)
class Difference:
    """Mean log-likelihood of a token under one model minus that under another, with its 95 % interval."""

    mean: float
    low: float
    high: float


def windows(ids: Sequence[int], size: int) -> list[list[int]]:
    """`ids` cut into windows of `size` tokens; the last may be shorter, and is left out where it predicts nothing."""
    cut = [list(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [window for window in cut if len(window) > 1]


def logits(runner: Runner, ids: Sequence[int], slot: int = 0) -> np.ndarray:
    """fp32 [len(ids), vocab_size]: after each token, what comes next. The slot's cache is empty before and after."""
    runner.cache.truncate(slot, 0)
    parts = [
        runner.step(Rows.of(list(ids[start : start + STEP_ROWS]), start, slot, "all"))
        for start in range(0, len(ids), STEP_ROWS)
    ]
    runner.cache.truncate(slot, 0)
    return np.concatenate(parts)


def score(runner: Runner, token_windows: Sequence[Sequence[int]]) -> Score:
    """The log-likelihood of every token but the first of each window."""
    return score_logits((logits(runner, window[:-1]) for window in token_windows), token_windows)


def score_logits(window_logits: Iterable[np.ndarray], token_windows: Sequence[Sequence[int]]) -> Score:
    """The same from each window's logits; those after its last token may be missing."""
    found = []
    for window, values in zip(token_windows, window_logits, strict=True):
        given = _log_softmax(values[: len(window) - 1])
        found.append(np.take_along_axis(given, np.asarray(window[1:], np.int64)[:, None], 1)[:, 0])
    return Score(np.concatenate(found), np.asarray([len(part) for part in found]))


def divergence(runner: Runner, baseline: Runner, token_windows: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(mean KL(baseline || model) in nats, share of places where both find the same token likeliest)."""
    total = agreed = count = 0.0
    for window in token_windows:
        ours, theirs = (_log_softmax(logits(r, window)) for r in (runner, baseline))
        total += float((np.exp(theirs) * (theirs - ours)).sum())
        agreed += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(window)
    return total / count, agreed / count


def compare(model: Score, baseline: Score) -> Difference:
    """The paired difference of two models on the same windows; windows, not tokens, count as independent."""
    if not np.array_equal(model.lengths, baseline.lengths):
        raise ValueError("the two scores are not of the same windows")
    gap = model.log_likelihoods - baseline.log_likelihoods
    mean = float(gap.mean())
    edges = np.concatenate([[0], np.cumsum(model.lengths)[:-1]])
    residuals = np.add.reduceat(gap - mean, edges)  # of each window, of a ratio estimate
    n = len(residuals)
    error = math.sqrt(float((residuals**2).sum()) * n / max(n - 1, 1)) / len(gap)
    return Difference(mean, mean - 1.96 * error, mean + 1.96 * error)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
