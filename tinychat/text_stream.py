"""From token ids to text that may be shown: whole characters, cut before a stop string. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """A tokenizer's incremental decoder."""

    def step(self, token: int) -> str:
        """The text that `token` completes: whole characters, possibly none."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class StopStrings:
    """Passes text through up to the stop string that is completed first (of several ending there, the longest).

    The outcome does not depend on how the text is split. Text is held back only while it could be the beginning of a
    stop string: at any time the longest end of the text that is a proper prefix of one.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown after `text` has come; none after a match."""
        if not self.stops:
            return text
        if self.matched is not None or not text:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            _, cut, self.matched = min(found)
            self._held = ""
            return text[:cut]
        cut = len(text) - self._prefix_length(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text still held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _prefix_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self.stops)) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


class TextStream:
    """Token ids in, showable text out. Without a decoder (a checkpoint that has no tokenizer) all text is empty."""

    def __init__(self, decoder: Decoder | None, stops: Sequence[str] = ()):
        self._decoder = decoder
        self._stops = StopStrings(stops)

    def prime(self, tokens: Sequence[int]) -> None:
        """Let the decoder see what comes before, so that the text continues it; a stop string does not reach back."""
        if self._decoder:
            for token in tokens:
                self._decoder.step(token)

    @property
    def stopped(self) -> bool:
        """A stop string was completed; no more text will come."""
        return self._stops.matched is not None

    def push(self, token: int) -> str:
        """The text that may be shown after `token`."""
        return self._stops.push(self._decoder.step(token)) if self._decoder else ""

    def flush(self) -> str:
        """The rest, at the end: the decoder's and what was held back. A stop string in it still cuts."""
        if self._decoder is None or self.stopped:
            return ""
        text = self._stops.push(self._decoder.flush())
        return text + self._stops.flush()
