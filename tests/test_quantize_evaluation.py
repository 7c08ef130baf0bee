import math
from types import SimpleNamespace

import numpy as np
import pytest

from tinychat.quantize import evaluation

SHARPNESS = math.log(91)


class Counting:
    """A runner whose next token is the last one plus one (of ten), with probability 0.91; it checks its cache."""

    def __init__(self, sharpness=SHARPNESS):
        self.filled = 0
        self.sharpness = sharpness
        self.cache = SimpleNamespace(truncate=self._truncate)

    def _truncate(self, slot, length):
        self.filled = length

    def step(self, rows):
        assert rows.positions[0] == self.filled
        self.filled += len(rows)
        out = np.zeros((len(rows.wanted), 10), np.float32)
        out[np.arange(len(out)), (rows.tokens[rows.wanted] + 1) % 10] = self.sharpness
        return out


def test_windows():
    assert evaluation.windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]
    assert evaluation.windows(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_perplexity_is_that_of_the_distribution():
    window = [i % 10 for i in range(600)]  # longer than one step
    found = evaluation.score(Counting(), [window, window[:50]])
    assert found.lengths.tolist() == [599, 49]
    assert found.perplexity == pytest.approx(1 / 0.91)
    wrong = evaluation.score(Counting(), [[1, 1, 1]])
    assert wrong.perplexity == pytest.approx(100)


def test_divergence():
    window = [[1, 2, 3, 4]]
    assert evaluation.divergence(Counting(), Counting(), window) == (pytest.approx(0), 1.0)
    kl, agreed = evaluation.divergence(Counting(0.0), Counting(), window)
    expected = 0.91 * math.log(0.91 / 0.1) + 9 * 0.01 * math.log(0.01 / 0.1)
    assert kl == pytest.approx(expected) and agreed == 0


def test_paired_interval_covers_the_truth_and_knows_its_windows():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        lengths = generator.integers(5, 30, 40)
        shared = np.repeat(generator.standard_normal(40), lengths)  # tokens of a window move together
        gap = 0.1 + shared + generator.standard_normal(len(shared))
        base = evaluation.Score(np.zeros(len(gap)), lengths)
        found = evaluation.compare(evaluation.Score(gap, lengths), base)
        assert found.low < found.mean < found.high
        covered += found.low <= 0.1 <= found.high
    assert 270 <= covered <= 297


def test_different_windows_cannot_be_compared():
    one = evaluation.score(Counting(), [[1, 2, 3]])
    two = evaluation.score(Counting(), [[1, 2], [2, 3]])
    with pytest.raises(ValueError, match="same windows"):
        evaluation.compare(one, two)
