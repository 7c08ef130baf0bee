"""Pieces of a linear on several threads, each of which computes alone.

An operation that all threads share ends with their waiting for each other. Of small operations that takes much of the
time, and many times all of it where another program wants a processor too: a search of limits took ten times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Made = TypeVar("Made")


def count() -> int:
    """Threads that `each` computes on."""
    return torch.get_num_threads() if torch.get_default_device().type == "cpu" else 1


def each(function: Callable[[Piece], Made], pieces: Iterable[Piece]) -> list[Made]:
    """`function` of each of the pieces, in their order, on as many threads as PyTorch has. The first error is raised.

    On one thread, a piece of this too, they are computed in turn; on a GPU, which has threads of its own, likewise.
    """
    n = count()
    if n == 1:
        return [function(piece) for piece in pieces]
    inference = torch.is_inference_mode_enabled()  # of this thread alone

    def made(piece: Piece) -> Made:
        with torch.inference_mode(inference):
            return function(piece)

    found = list(_pool(n).map(made, pieces))
    torch.set_num_threads(n)  # of threads to come, for which those of the pool have changed it
    return found


@functools.cache
def _pool(n: int) -> ThreadPoolExecutor:
    """Kept: libraries have buffers of each thread, which would be made anew."""
    return ThreadPoolExecutor(n, "quantize", initializer=lambda: torch.set_num_threads(1))
