"""Logits that another engine computed, in the place of a runner: our evaluation measures them as it measures ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


class Recorded:
    """What `tinychat.evaluation.likelihood` asks of a runner, answered from a file.

    path       .npy of float32 [tokens, vocab_size]: of each window all places but the last, in order
    sequences  what was recorded, so that nothing else is answered; ValueError where something else is asked
    """

    def __init__(self, path: Path, sequences: Sequence[Sequence[int]]):
        self._table = np.load(path, mmap_mode="r")
        self._tokens = [token for ids in sequences for token in ids]
        if len(self._table) != len(self._tokens):
            raise ValueError(f"{path} holds {len(self._table)} rows, not {len(self._tokens)}")
        self._at = 0
        self.config = SimpleNamespace(vocab_size=self._table.shape[1])
        self.cache = SimpleNamespace(truncate=lambda slot, length: None)

    def step(self, rows: Any) -> np.ndarray:
        """The logits of the next rows."""
        asked = rows.tokens.tolist()
        end = self._at + len(asked)
        if asked != self._tokens[self._at : end]:
            raise ValueError(f"tokens {self._at} to {end} are not those that were recorded")
        found, self._at = np.asarray(self._table[self._at : end]), end % len(self._tokens)
        return found
