"""Keep a model's text from steering the terminal it is shown on.

A model may emit what a terminal obeys: cursor moves, a new window title, text for the clipboard (OSC 52). Where the
output is a terminal such sequences (ECMA-48) are dropped; a pipe gets the text untouched.
"""

from __future__ import annotations

_ESC = "\x1b"
_STRINGS = "]PX^_"  # after ESC, these open a string that lasts to BEL or ST (ESC \)
_C1 = {
    "\x9b": "[",
    "\x9d": "]",
    "\x90": "P",
    "\x98": "X",
    "\x9e": "^",
    "\x9f": "_",
}  # one character for ESC and another


class EscapeFilter:
    """Drops control characters, newline and tab excepted, and whole escape sequences, however the text is cut up.

    Nothing is held back: the state says what the next character continues. A string sequence that is never closed
    ends with its line, so that a stray opening does not swallow the rest of an answer.
    """

    def __init__(self) -> None:
        self._state = ""  # "", then ESC, "[" (control sequence) or "]" (string)

    def __call__(self, text: str) -> str:
        """`text` without what a terminal would obey."""
        if not self._state and text.isprintable():
            return text
        kept = []
        for char in text:
            self._state, visible = _advance(self._state, char)
            if visible:
                kept.append(char)
        return "".join(kept)


def _advance(state: str, char: str) -> tuple[str, bool]:
    """(next state, whether `char` is shown)."""
    if char == _ESC:
        return _ESC, False  # ends whatever was open; ST is ESC and a backslash, which the next call drops
    if char in _C1:
        return ("[" if char == "\x9b" else "]"), False
    if char == "\n":
        return "", True
    if state == _ESC:
        if char == "[":
            return "[", False
        if char in _STRINGS:
            return "]", False
        if " " <= char <= "~":
            return (_ESC if char <= "/" else ""), False  # intermediates, then one final character
    elif state == "[":
        if " " <= char <= "~":
            return ("[" if char <= "?" else ""), False
    elif state == "]":
        return ("" if char in "\x07\x9c" else "]"), False
    return "", char == "\t" or not (char < " " or "\x7f" <= char <= "\x9f")
