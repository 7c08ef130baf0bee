"""Reads a SentencePiece `tokenizer.model`: a protocol buffer of which a dozen fields matter.

The sentencepiece package would load the file too, but does not tell which pieces are user-defined symbols, and ids must
equal those of the byte-pair merges that transformers derives from the pieces. It knows nothing of encoding.
Field numbers: sentencepiece_model.proto of the SentencePiece project.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tinychat.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Values of `Piece.kind`."""

_UNIGRAM, _BPE = 1, 2
_MODEL_KINDS: dict[int | bytes, str] = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
_SPECIAL_PIECES = ((40, 0, 45, b"<unk>"), (41, 1, 46, b"<s>"), (42, 2, 47, b"</s>"))
"""Of the unknown, beginning and end piece: the field of its id, the default, the field of its text, the default."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    kind: int
    score: float = 0.0  # where pieces can be joined in several ways, that of the highest score is


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` says."""

    pieces: list[Piece]
    byte_fallback: bool
    unk_piece: str | None  # None where the model was trained without one, as for the next two
    bos_piece: str | None
    eos_piece: str | None
    character_map: bytes  # the compiled normalization rules; empty for none
    prefix_space: bool  # one is put before a text
    single_spaces: bool  # spaces around a text are dropped, several within are one
    escapes_spaces: bool  # as "▁", which pieces are written with


def read_model(path: Path) -> SentencePieceModel:
    """A SentencePiece BPE model; raises TokenizerError for a damaged file or another kind of model."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error}") from None
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(data):
            if field == 1:
                pieces.append(_piece(_bytes(value)))
            elif field == 2:
                trainer.update(_fields(_bytes(value)))
            elif field == 3:
                normalizer.update(_fields(_bytes(value)))
        unk, bos, eos = (_special_piece(trainer, *spec) for spec in _SPECIAL_PIECES)
        character_map = _bytes(normalizer.get(2, b""))
        rules = [bool(normalizer.get(number, 1)) for number in (3, 4, 5)]
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"{path} is not a SentencePiece model, or is damaged: {error}") from None
    if not pieces:
        raise TokenizerError(f"{path} is not a SentencePiece model: it holds no pieces")
    if not trainer:
        raise TokenizerError(f"{path} is not a SentencePiece model, or is damaged: it has no trainer settings")
    kind = trainer.get(3, _UNIGRAM)
    if kind != _BPE:
        raise TokenizerError(
            f"{path} is a SentencePiece {_MODEL_KINDS.get(kind, kind)} model; only bpe is supported: "
            f"give the tokenizer as tokenizer.json"
        )
    texts = {piece.text for piece in pieces}
    if len(texts) < len(pieces):
        raise TokenizerError(f"{path} is damaged: {len(pieces) - len(texts)} of its pieces occur more than once")
    return SentencePieceModel(pieces, bool(trainer.get(35, 0)), unk, bos, eos, character_map, *rules)


def bpe_merges(pieces: Mapping[str, object]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order of the thirds (learned earlier), shorter left first."""
    return [
        (text[:cut], text[cut:])
        for text in pieces
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    kind = fields.get(3, NORMAL)
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    return Piece(_bytes(fields.get(1, b"")).decode("utf-8"), kind if isinstance(kind, int) else NORMAL, score)


def _special_piece(trainer: dict[int, int | bytes], id_field: int, id_: int, field: int, text: bytes) -> str | None:
    number = trainer.get(id_field, id_)
    is_negative = isinstance(number, int) and number >= 1 << 63  # -1, as a varint
    return None if is_negative else _bytes(trainer.get(field, text)).decode("utf-8")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is due")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: varints as int, the rest as bytes. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire_type = tag & 7
        if wire_type == _VARINT:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if wire_type == _LENGTH_DELIMITED:
            length, at = _varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes at byte {at} ends after the file's {len(data)}")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at byte `at` and the place after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"an endless number at byte {at}")
