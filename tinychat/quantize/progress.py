"""How far the walk over the layers is, and how long the rest will take.

On a terminal one line is rewritten; elsewhere, in a log, each finished layer leaves a line.
"""

from __future__ import annotations

import sys
import time


class Progress:
    """Told of `n_layers` layers, of which `first` were done by an earlier run. Writes to stderr where `shown`."""

    def __init__(self, n_layers: int, first: int = 0, *, shown: bool = True):
        self._n = n_layers
        self._first = self._done = first
        self._began = time.monotonic()
        self._shown = shown
        self._live = sys.stderr.isatty()
        self._width = 0
        if first:
            self._line(f"going on after layer {first} of {n_layers}, which an earlier run finished")

    def doing(self, what: str) -> None:
        """`what` is done to the layer at hand."""
        if self._live:
            self._write(f"quantizing layer {self._done + 1} of {self._n}: {what}{self._left()}", end="")

    def done(self) -> None:
        """The layer at hand is finished, and kept."""
        self._done += 1
        if not self._live:
            self._line(f"quantizing: layer {self._done} of {self._n} done{self._left()}")
        elif self._done == self._n:
            self._write("", end="\r")

    def _left(self) -> str:
        """From the mean of the layers that this run finished."""
        finished = self._done - self._first
        if not finished or self._done == self._n:
            return ""
        each = (time.monotonic() - self._began) / finished
        return f"; {duration(each)} a layer, about {duration(each * (self._n - self._done))} left"

    def _line(self, text: str) -> None:
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        if self._shown:
            before = "\r" if self._live else ""
            sys.stderr.write(before + text.ljust(self._width) + end)
            sys.stderr.flush()
            self._width = len(text) if end == "" else 0


def duration(seconds: float) -> str:
    """For reading: '8.3 s', '12 min', '3 h 20 min'."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
