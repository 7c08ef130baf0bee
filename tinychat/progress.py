"""One line on the terminal while a model loads, where that takes a while."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PATIENCE_S = 0.5  # a shorter wait needs no explanation


class Loading:
    """Called as `(done, total)` while a model loads: shows the share on stderr, if a terminal, then removes it."""

    def __init__(self, name: str):
        self._name = name
        self._start = time.monotonic()
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` parts are loaded."""
        if time.monotonic() - self._start >= PATIENCE_S and sys.stderr.isatty():
            line = f"loading {self._name}: {100 * done // max(total, 1)} %"
            self._show(line)

    def _show(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def __enter__(self) -> Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._width:
            self._show("")
            sys.stderr.write("\r")
