"""One GGUF file, llama.cpp's format: its metadata, and its tensors as floats or as what they are quantized to.

The format: magic, version, the numbers of tensors and of keys; each key with the type of its value and the value; of
each tensor its name, dimensions (the innermost first), kind and place; then, aligned, the numbers. All little-endian.

What is read is what a `QTensor` expresses exactly: in blocks along a row,

    Q4_0  32 codes of 4 bits, w = (q - 8) s        s fp16
    Q8_0  32 codes of 8 bits, w = q s              s fp16; as a QTensor q + 128 with a zero of 128
    Q6_K  16 codes of 6 bits, w = (q - 32) (d s)   d fp16 for 16 scales s of 8 bits: the product fits fp32

and F32, F16 and BF16; only a table of which rows are looked up is rounded, to fp16, where it is asked for as floats.
The minima of Q4_1 and its kin are real numbers, which no zero is: they are refused by name.
It knows no model.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.checkpoint.finite import all_finite
from tinychat.checkpoint.quoting import quote
from tinychat.checkpoint.safetensors_file import MAX_DIMENSIONS, MAX_TENSORS
from tinychat.errors import CheckpointError
from tinychat.qtensor import StoredCodes, bfloat16

MAX_KEYS = 1 << 16
_VERSIONS = (2, 3)
_TOGETHER = 1 << 17  # weights unpacked at a time: what stays in the cache
_ALIGNMENT = 32  # of tensors, where general.alignment does not say otherwise
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # types of values, for struct
_STRING, _ARRAY = 8, 9


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    """A scale, then byte i holds codes i (low) and i + 16."""
    return np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    """A scale, then signed codes."""
    return blocks[..., 2:] ^ 128


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Low nibbles, upper pairs of bits, 16 signed scales, and the scale of these.

    Of each half of the 256 codes, 64 bytes hold the nibbles of codes i (low) and i + 64, and 32 bytes the upper bits of
    codes i, i + 32, i + 64 and i + 96, the lowest first.
    """
    n, count = blocks.shape[:2]
    nibbles = blocks[..., :128].reshape(n, count, 2, 1, 64) >> np.array([[0], [4]], np.uint8) & 15
    pairs = blocks[..., 128:192].reshape(n, count, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    return nibbles.reshape(pairs.shape) | pairs << 4  # [N, blocks, halves, 4, 32]


def _first_half(blocks: np.ndarray) -> np.ndarray:
    """One fp16 scale at the beginning of a block."""
    return np.ascontiguousarray(blocks.view("<f2")[..., 0])


def _products(blocks: np.ndarray) -> np.ndarray:
    """Scales of 8 bits and the fp16 scale of these, the last 18 bytes: fp32 products."""
    return blocks.view(np.int8)[..., -18:-2] * blocks.view("<f2")[..., -1:].astype(np.float32)


@dataclass(frozen=True)
class Kind:
    """Of a tensor: a block of `block` weights along a row takes `nbytes`."""

    name: str
    block: int
    nbytes: int


@dataclass(frozen=True)
class Plain(Kind):
    """Floats."""

    dtype: np.dtype


@dataclass(frozen=True)
class Quantized(Kind):
    """Of blocks uint8 [N, blocks, nbytes], `codes` are [N, ...] and `scales` [N, blocks, groups of a block]."""

    codes: Callable[[np.ndarray], np.ndarray]
    scales: Callable[[np.ndarray], np.ndarray]
    bits: int
    group_size: int

    def spread(self, stored: np.ndarray) -> np.ndarray:
        """uint8 [N, bytes of a row] -> codes uint8 [N, K]."""
        n = len(stored)
        made = np.empty((n, stored.shape[1] // self.nbytes * self.block), np.uint8)
        step = max(1, _TOGETHER // made.shape[1])
        for rows in (slice(first, first + step) for first in range(0, n, step)):
            made[rows] = self.codes(self._blocks(stored[rows])).reshape(-1, made.shape[1])
        return made

    def read(self, stored: np.ndarray) -> StoredCodes:
        """The weight that uint8 [N, bytes of a row] stand for; the zero is in the middle."""
        n, k = len(stored), stored.shape[1] // self.nbytes * self.block
        scales = self.scales(self._blocks(stored)).reshape(n, -1)
        zeros = np.full(scales.shape, 1 << self.bits - 1, np.uint8)
        return StoredCodes(stored, self.name.lower(), self.spread, k, scales, zeros, self.bits, self.group_size)

    def _blocks(self, stored: np.ndarray) -> np.ndarray:
        return stored.reshape(len(stored), -1, self.nbytes)


_KINDS: dict[int, Kind] = {
    0: Plain("F32", 1, 4, np.dtype("<f4")),
    1: Plain("F16", 1, 2, np.dtype("<f2")),
    30: Plain("BF16", 1, 2, bfloat16),
    2: Quantized("Q4_0", 32, 18, _q4_0, _first_half, 4, 32),
    8: Quantized("Q8_0", 32, 34, _q8_0, _first_half, 8, 32),
    14: Quantized("Q6_K", 256, 210, _q6_k, _products, 6, 16),
}
_REFUSED = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 15: "Q8_K"}
_REFUSED |= {16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S"}
_REFUSED |= {23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


@dataclass(frozen=True)
class Tensor:
    """What the header says of one. `begin` is in bytes from the start of the file."""

    kind: Kind
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) // self.kind.block * self.kind.nbytes


class GgufFile:
    """`metadata` by key, `tensors` by name; opening it reads the header only.

    `CheckpointError` where the file is not exactly what the format asks for, or has what is not read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.nbytes = path.stat().st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as fault:  # ValueError: an empty file
            raise self.error(f"cannot be read: {fault}") from None
        self._at = 0
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, ValueError, RecursionError) as fault:
            raise self.error(f"is not a GGUF file, or is damaged: {fault}") from None

    def quantized(self, name: str) -> StoredCodes:
        """Tensor `name`, which is quantized; its codes as they are mapped."""
        kind, blocks = self._rows(name)
        return self._checked(name, kind.read(blocks))

    def table(self, name: str) -> np.ndarray:
        """Tensor `name` as floats: mapped, or where it is quantized rounded to fp16; read-only."""
        tensor = self.tensors[name]
        if isinstance(tensor.kind, Plain):
            return self._stored(tensor).view(tensor.kind.dtype).reshape(tensor.shape)
        kind, blocks = self._rows(name)
        made = np.empty(tensor.shape, np.float16)
        step = max(1, _TOGETHER // tensor.shape[1])  # a row unpacked takes several times its room
        for rows in (slice(first, first + step) for first in range(0, len(made), step)):
            made[rows] = self._checked(name, kind.read(blocks[rows])).tensor().dequantize(np.float16)
        made.flags.writeable = False
        return made

    def _rows(self, name: str) -> tuple[Quantized, np.ndarray]:
        """(kind, uint8 [N, bytes of a row]) of a tensor that is quantized."""
        tensor = self.tensors[name]
        assert isinstance(tensor.kind, Quantized)
        return tensor.kind, self._stored(tensor).reshape(tensor.shape[0], -1)

    def _checked(self, name: str, weight: StoredCodes) -> StoredCodes:
        if not all_finite(weight.scales):
            raise self.error(f"has scales in {quote(name)} that are not finite; the file is damaged")
        return weight

    def _stored(self, tensor: Tensor) -> np.ndarray:
        """Its bytes."""
        if self._map.size() != self.nbytes:  # touching a mapped page beyond the end would kill the process
            raise self.error("changed its size while it was being read; load it again once it is complete")
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.begin)

    def release(self) -> None:
        """Let the system take back the memory of pages read so far; arrays stay valid and read them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def error(self, what: str) -> CheckpointError:
        """To raise: that the file `what`."""
        return CheckpointError(f"{quote(str(self.path))} {what}")

    def _parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise self.error(f"is GGUF of version {version}, or of the other byte order; versions 2 and 3 are read")
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise ValueError(f"{n_tensors:,} tensors and {n_keys:,} keys; at most {MAX_TENSORS:,} and {MAX_KEYS:,} are")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._text()
            if key in metadata:
                raise ValueError(f"key {quote(key)} is there twice")
            metadata[key] = self._value(self._scalar("I"))
        if metadata.get("split.count", 1) != 1:
            raise self.error("is one of several parts; join them with llama.cpp's gguf-split --merge")
        tensors: dict[str, Tensor] = {}
        refused: Counter[str] = Counter()
        for _ in range(n_tensors):
            name, n_dimensions = self._text(), self._scalar("I")
            if name in tensors or not 1 <= n_dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"tensor {quote(name)} is there twice, or has {n_dimensions} dimensions")
            shape = tuple(reversed([self._scalar("Q") for _ in range(n_dimensions)]))
            number, begin = self._scalar("I"), self._scalar("Q")
            if number not in _KINDS:
                refused[_REFUSED.get(number, f"kind {number}")] += 1
                continue
            tensors[name] = Tensor(_KINDS[number], shape, begin)
        if refused:
            raise self._refusal(refused)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment % 8:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: self._placed(name, tensor, start) for name, tensor in tensors.items()}

    def _placed(self, name: str, tensor: Tensor, start: int) -> Tensor:
        placed = Tensor(tensor.kind, tensor.shape, start + tensor.begin)
        if placed.begin % 4 or placed.begin + placed.nbytes > self.nbytes:
            raise ValueError(f"{quote(name)} lies askew or beyond the end; the download is incomplete")
        of_rows = len(tensor.shape) == 2 and 0 not in tensor.shape
        if tensor.shape[-1] % tensor.kind.block or not (of_rows or isinstance(tensor.kind, Plain)):
            raise ValueError(f"{quote(name)} of shape {list(tensor.shape)} is {tensor.kind.name}")
        return placed

    def _refusal(self, found: Counter[str]) -> CheckpointError:
        kinds = ", ".join(f"{count} tensors of {kind}" for kind, count in found.most_common())
        read = ", ".join(kind.name for kind in _KINDS.values())
        return self.error(
            f"has {kinds}, which are not read (their weights are no multiples of a scale, or they are rare); read are "
            f"{read}. Take the model's Q4_0, Q6_K or Q8_0 file, or the original checkpoint and 'tinychat quantize'"
        )

    def _bytes(self, count: int) -> bytes:
        found = self._map[self._at : self._at + count]
        if len(found) < count:
            raise ValueError(f"it ends at byte {self.nbytes}, within its header")
        self._at += count
        return found

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        return self._bytes(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind} at byte {self._at}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if count > self.nbytes:
            raise ValueError(f"an array of {count:,} at byte {self._at}")
        if kind in _SCALARS:
            code = np.dtype(_SCALARS[kind]).newbyteorder("<")
            return np.frombuffer(self._bytes(count * code.itemsize), code).tolist()
        return [self._value(kind) for _ in range(count)]
