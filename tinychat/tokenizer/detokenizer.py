"""Token ids to text, one at a time, so that an answer can be shown while it is made.

A token may end inside a character, so bytes are held until the character is whole, or cannot become one. Every piece
given out is final. Which bytes a token stands for is read from the decoder of a `tokenizers.Tokenizer`, of which the
kinds in use by language models are known here: byte-level, and "▁" with byte fallback. It knows nothing of models.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tinychat.errors import TokenizerError

_EACH_BYTE = "tinychat_replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


@dataclass(frozen=True)
class Scheme:
    """How the tokens of one vocabulary become bytes."""

    byte_level: bool = False  # each character of a token stands for one byte
    byte_fallback: bool = False  # tokens such as <0x0A> are bytes
    replacements: tuple[tuple[str, str], ...] = ()
    prefix: str = ""  # put before every token
    strip_first: str = ""  # removed once from the beginning of the text
    drop_in_first: str = ""  # removed wherever it stands in the first token

    @property
    def errors(self) -> str:
        """The decoding error handler: byte-level counts broken sequences, byte fallback counts broken bytes."""
        return _EACH_BYTE if self.byte_fallback else "replace"

    def token_bytes(self, token: str) -> bytes:
        """The bytes that a token stands for inside a text."""
        if self.byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # a special token is written as it is
                return token.encode("utf-8")
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return (self.prefix + token).encode("utf-8")


@dataclass
class IncrementalDecoder:
    """Takes token ids, gives out text as soon as it is certain.

    The pieces together are the text of all tokens decoded at once, but for two things. An incomplete character at
    the very end is dropped by `flush` (at once, it would become U+FFFD). And where bytes of a byte-fallback vocabulary
    go wrong in the middle of a run of them, decoding at once spoils the whole run, whose beginning was given out here.
    """

    scheme: Scheme
    token: Callable[[int], str | None]  # the token's text in the vocabulary; None for those that are not shown
    known: dict[int, tuple[bytes, str | None]] = field(default_factory=dict, repr=False)
    # Of tokens so far, the bytes, and their text where they are whole characters: decoders may share it
    _bytes: codecs.IncrementalDecoder = field(init=False, repr=False)
    _holds: bool = field(default=False, init=False)  # bytes of an incomplete character
    _is_first_token: bool = field(default=True, init=False)
    _is_first_text: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors=self.scheme.errors)

    def step(self, token_id: int) -> str:
        """The text that this token makes certain: none while a character is incomplete. Never lasts over 3 bytes."""
        found = self.known.get(token_id)
        if found is None or self._is_first_token:
            token = self.token(token_id)
            if token is None:
                return ""
            if found is None:
                found = self.known[token_id] = _whole(self.scheme.token_bytes(token))
            if self._is_first_token:
                self._is_first_token = False
                if self.scheme.drop_in_first:
                    found = _whole(self.scheme.token_bytes(token.replace(self.scheme.drop_in_first, "")))
        data, text = found
        if text is None or self._holds:
            text = self._bytes.decode(data)
            self._holds = bool(self._bytes.getstate()[0])
        return self._shown(text) if self._is_first_text else text

    def flush(self) -> str:
        """The text still held back when no more tokens come; afterwards the decoder is as new.

        Bytes of an incomplete character are dropped: they were on their way to be text, and would show as garbage.
        """
        held = self._bytes.getstate()[0]
        # Python's decoder also waits for the third byte of a surrogate, which no UTF-8 text has.
        is_surrogate = held[:1] == b"\xed" and held[1:2] >= b"\xa0"
        text = self._shown(self._bytes.decode(b"", final=True)) if is_surrogate else ""
        self._bytes.reset()
        self._holds = False
        self._is_first_token = self._is_first_text = True
        return text

    def _shown(self, text: str) -> str:
        if self._is_first_text and text:
            self._is_first_text = False
            return text.removeprefix(self.scheme.strip_first)
        return text


def _whole(data: bytes) -> tuple[bytes, str | None]:
    """Bytes, and their text where they are whole characters."""
    try:
        return data, data.decode("utf-8")
    except UnicodeDecodeError:
        return data, None


def read_scheme(decoder: Any) -> Scheme:
    """The scheme of a `tokenizers` decoder; raises TokenizerError for one of a kind not known here."""
    if decoder is None:  # the library then joins tokens with spaces
        return Scheme(prefix=" ", strip_first=" ")
    spec = json.loads(decoder.__getstate__())
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    found: dict[str, Any] = {}
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and len(steps) == 1:
            found["byte_level"] = True
        elif kind == "ByteFallback" and not fused:
            found["byte_fallback"] = True
        elif kind == "Fuse":
            fused = True
        elif kind == "Replace" and "String" in step["pattern"] and not fused and "byte_fallback" not in found:
            found["replacements"] = (*found.get("replacements", ()), (step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and fused and step["start"] == 1 and step["stop"] == 0 and "strip_first" not in found:
            found["strip_first"] = step["content"]
        elif kind == "Metaspace" and len(steps) == 1:
            found["replacements"] = ((step["replacement"], " "),)
            if step.get("prepend_scheme", "always") != "never":
                found["drop_in_first"] = step["replacement"]
        else:
            raise TokenizerError(
                f"the tokenizer decodes with {' then '.join(s['type'] for s in steps)}, which is not supported: "
                f"known are ByteLevel, Metaspace, and Replace, ByteFallback, Fuse, Strip in this order"
            )
    return Scheme(**found)


def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + i): byte for i, byte in enumerate(others)}}


_BYTE_OF_CHARACTER = _byte_of_character()
