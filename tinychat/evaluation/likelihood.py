"""Likelihoods of a text, perplexity, and how far one model's predictions lie from another's, with their uncertainty.

Everything is measured through `Runner.step`, on any backend, in pieces of rows, so that memory stays bounded where the
vocabulary is large. A window is scored on its own: its first token is given, every other one predicted from those
before it. Log-probabilities are natural logarithms in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinychat.backends import Runner
from tinychat.cache import Rows
from tinychat.engine import common_prefix
from tinychat.errors import BackendError

STEP_ROWS = 256
STEP_LOGITS = 1 << 24  # of one step at most, 64 MB, unless the vocabulary leaves fewer than 16 rows
BLOCK_LOGITS = 1 << 17  # widened to fp64 at a time: what stays in the cache
CLUSTERS = 20  # fewer windows than that say little about their spread: blocks of tokens are counted instead
BLOCK_TOKENS = 128

Progress = Callable[[int], None]  # is told how many more tokens are done


@dataclass(frozen=True, eq=False)
class Score:
    """Log-likelihoods of the predicted tokens, in nats, fp64; `lengths` of each window's part of them."""

    log_likelihoods: np.ndarray
    lengths: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token; infinity where that is beyond fp64."""
        return perplexity(self.mean.mean)

    @property
    def mean(self) -> Estimate:
        """Of the log-likelihoods."""
        return estimate(self.log_likelihoods, self.lengths)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens with its 95 % interval, which is infinite where a single token was measured."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same windows.

    change  log-likelihood of a token under the model minus that under the baseline, in nats, paired
    kl      KL(baseline || model) after a token, in nats
    top1    share of the places at which both find the same token likeliest
    """

    score: Score
    baseline: Score
    change: Estimate
    kl: Estimate
    top1: Estimate


def windows(ids: Sequence[int], size: int) -> list[list[int]]:
    """`ids` cut into windows of `size` tokens, as the paper does: a shorter rest at the end is left out.

    A text shorter than that is one window; fewer than two tokens make none, for they predict nothing.
    """
    if len(ids) < size:
        return [list(ids)] if len(ids) > 1 else []
    return [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]


def perplexity(log_likelihood: float) -> float:
    """exp(-log_likelihood) of a mean log-likelihood; infinity where that is beyond fp64."""
    return math.exp(-log_likelihood) if log_likelihood > -700 else math.inf


def logits(runner: Runner, ids: Sequence[int], slot: int = 0) -> Iterator[np.ndarray]:
    """After each token, what comes next, in pieces: fp32 [rows, vocab_size]. The slot's cache is emptied first."""
    runner.cache.truncate(slot, 0)
    rows = _rows(runner)
    for start in range(0, len(ids), rows):
        yield runner.step(Rows.of(list(ids[start : start + rows]), start, slot, "all"))
    runner.cache.truncate(slot, 0)


def score(runner: Runner, token_windows: Sequence[Sequence[int]], progress: Progress | None = None) -> Score:
    """The log-likelihood of every token but the first of each window. BackendError where one is not finite."""
    found = []
    for window in token_windows:
        done = 0
        for piece in logits(runner, window[:-1]):
            targets = np.asarray(window[done + 1 : done + 1 + len(piece)], np.int64)
            for rows in _blocks(piece):
                found.append(_chosen(_log_softmax(piece[rows]), targets[rows]))
            done += len(piece)
            if progress:
                progress(len(piece))
    return _finite(Score(np.concatenate(found), _lengths(token_windows)))


def compare_runs(
    model: Runner, baseline: Runner, token_windows: Sequence[Sequence[int]], progress: Progress | None = None
) -> Comparison:
    """Both models on the same windows, side by side, at the places where a token is predicted; errors as `score`."""
    ours_found, theirs_found, kl, agreed = [], [], [], []
    for window in token_windows:
        given, done = window[:-1], 0
        for ours_piece, theirs_piece in zip(logits(model, given), logits(baseline, given), strict=True):
            targets = np.asarray(window[done + 1 : done + 1 + len(ours_piece)], np.int64)
            for rows in _blocks(ours_piece):
                ours, theirs = _log_softmax(ours_piece[rows]), _log_softmax(theirs_piece[rows])
                ours_found.append(_chosen(ours, targets[rows]))
                theirs_found.append(_chosen(theirs, targets[rows]))
                kl.append((np.exp(theirs) * (theirs - ours)).sum(-1))
                agreed.append((ours.argmax(-1) == theirs.argmax(-1)).astype(np.float64))
            done += len(ours_piece)
            if progress:
                progress(len(ours_piece))
    lengths = _lengths(token_windows)
    scored, base = (_finite(Score(np.concatenate(found), lengths)) for found in (ours_found, theirs_found))
    divergence, same = (estimate(np.concatenate(found), lengths) for found in (kl, agreed))
    top1 = Estimate(same.mean, max(same.low, 0.0), min(same.high, 1.0))
    return Comparison(scored, base, compare(scored, base), divergence, top1)


def continuation(
    runner: Runner, held: list[int], ids: Sequence[int], n_scored: int, slot: int = 0
) -> tuple[float, bool]:
    """(log-likelihood of the last `n_scored` of `ids` after those before them, whether each is the likeliest there).

    held  what the slot's cache holds, brought up to date here: what `ids` begin with in common is not run again, so
          that many continuations of one context cost little
    """
    first = len(ids) - n_scored  # the row before it predicts it
    keep = min(common_prefix(held, ids), first - 1)
    runner.cache.truncate(slot, keep)
    del held[keep:]
    pieces = []
    for end, wanted in ((first - 1, "none"), (len(ids) - 1, "all")):
        rows = _rows(runner) if wanted == "all" else STEP_ROWS
        while len(held) < end:
            run = list(ids[len(held) : min(end, len(held) + rows)])
            found = runner.step(Rows.of(run, len(held), slot, wanted))
            held += run
            if wanted == "all":
                pieces.append(_log_softmax(found))
    targets = np.asarray(ids[first:], np.int64)
    table = np.concatenate(pieces)
    return float(_chosen(table, targets).sum()), bool((table.argmax(-1) == targets).all())


def compare(model: Score, baseline: Score) -> Estimate:
    """Mean log-likelihood of a token under one model minus that under another, paired."""
    if not np.array_equal(model.lengths, baseline.lengths):
        raise ValueError("the two scores are not of the same windows")
    return estimate(model.log_likelihoods - baseline.log_likelihoods, model.lengths)


def estimate(values: np.ndarray, lengths: np.ndarray) -> Estimate:
    """The mean of `values` with its interval; `lengths` of each window's part of them.

    Windows, not tokens, count as independent, for what a text is about moves all of its tokens together; under
    CLUSTERS windows, blocks of at most BLOCK_TOKENS tokens of a window do.
    """
    mean = float(values.mean())
    if len(lengths) < CLUSTERS:
        size = min(BLOCK_TOKENS, max(1, len(values) // CLUSTERS))
        lengths = np.asarray([min(size, n - start) for n in lengths.tolist() for start in range(0, n, size)])
    edges = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    residuals = np.add.reduceat(values - mean, edges)  # of each cluster, of a ratio estimate
    n = len(residuals)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf)
    error = math.sqrt(float((residuals**2).sum()) * n / (n - 1)) / len(values)
    return Estimate(mean, mean - _quantile(n - 1) * error, mean + _quantile(n - 1) * error)


def _quantile(freedom: int) -> float:
    """Student's t at 97.5 %, by its expansion around the normal distribution: within 1 % from 4 degrees on."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _finite(found: Score) -> Score:
    if not np.isfinite(found.log_likelihoods).all():
        raise BackendError(
            "the model's output is not finite: the checkpoint is damaged, or its activations do not fit the backend's "
            "number format; try another device"
        )
    return found


def _rows(runner: Runner) -> int:
    """Of a step that returns the logits of all of them."""
    return min(STEP_ROWS, max(16, STEP_LOGITS // runner.config.vocab_size))


def _lengths(token_windows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.asarray([len(window) - 1 for window in token_windows])


def _blocks(piece: np.ndarray) -> Iterator[slice]:
    step = max(1, BLOCK_LOGITS // piece.shape[1])
    for start in range(0, len(piece), step):
        yield slice(start, start + step)


def _chosen(log_probabilities: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probabilities, tokens[:, None], 1)[:, 0]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
