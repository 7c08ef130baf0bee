"""One line on the terminal while something takes a while."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PATIENCE_S = 0.5  # a shorter wait needs no explanation


class Status:
    """Called with a text, shows it on stderr, if a terminal, in place of the one before. A context manager."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._width = 0

    def __call__(self, text: str) -> None:
        """Show `text`, unless the wait has just begun."""
        if time.monotonic() - self._start >= PATIENCE_S and sys.stderr.isatty():
            self._show(text)

    def _show(self, line: str) -> None:
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def __enter__(self) -> Status:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._width:
            self._show("")
            sys.stderr.write("\r")


class Loading:
    """Called as `(done, total)` while a model loads, or is written: shows the share, then removes it."""

    def __init__(self, name: str, doing: str = "loading"):
        self._what = f"{doing} {name}"
        self._status = Status()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` parts are ready."""
        self._status(f"{self._what}: {100 * done // max(total, 1)} %")

    def __enter__(self) -> Loading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.__exit__(kind, error, trace)
