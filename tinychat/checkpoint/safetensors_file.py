"""One safetensors file, read strictly and mapped into memory.

The format: eight bytes of header length, a JSON header naming each tensor's dtype, shape and place, then the numbers,
little-endian and row-major, one tensor after the other without a gap. It is parsed here and not by the safetensors
library because a file from a stranger needs more refused than the library refuses: repeated names and endless headers.

Knows nothing of models; `reader.py` says which tensors there should be.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinychat.checkpoint.json_file import parse_object
from tinychat.checkpoint.quoting import quote
from tinychat.errors import CheckpointError
from tinychat.qtensor import bfloat16

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 50_000  # in one file; a shard of a large mixture of experts has about 15,000
MAX_DIMENSIONS = 8

DTYPES = {  # what numpy can hold of the format's types; the rest may occur in a file but not be asked for
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": bfloat16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_ITEMSIZE = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
_IMPOSTORS = (
    (b"PK\x03\x04", "a zip archive (PyTorch's pickle format), which can run code when it is opened"),
    (b"\x80\x02", "a pickle, which can run code when it is opened"),
    (b"\x80\x03", "a pickle, which can run code when it is opened"),
    (b"\x80\x04", "a pickle, which can run code when it is opened"),
    (b"\x80\x05", "a pickle, which can run code when it is opened"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights themselves; run 'git lfs pull'"),
    (b"<", "a web page or XML, probably an error page that was saved in place of the weights"),
)


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor. `begin` and `end` are bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """The tensors of one file; opening it reads and checks the header only.

    `CheckpointError` where the file is not exactly what the format asks for.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if not path.is_file():
                raise self._error("is not a regular file" if path.exists() else "is missing")
            with path.open("rb") as file:
                self.nbytes = path.stat().st_size
                header = self._read_header(file)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as fault:
            raise self._error(f"cannot be read: {fault.strerror}") from None
        if self._map.size() != self.nbytes:
            raise self._error("is being changed by another program; wait until it is done")
        self.metadata, self.tensors = self._parse(header)

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as a read-only array on the mapped file; copied only where it lies askew in memory."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise self._error(f"stores {quote(name)} as {info.dtype}, which is not supported")
        if self._map.size() != self.nbytes:  # touching a mapped page beyond the end would kill the process
            raise self._error("changed its size while it was being read; load it again once it is complete")
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self._map, dtype, (info.end - info.begin) // dtype.itemsize, info.begin)
        array = flat.reshape(info.shape)
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def release(self) -> None:
        """Let the system take back the memory of pages read so far; arrays stay valid and read them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{quote(str(self.path))} {what}")

    def _read_header(self, file: Any) -> bytes:
        start = file.read(32)
        if start[8:9] != b"{":
            for magic, description in _IMPOSTORS:
                if start.startswith(magic):
                    raise self._error(f"is not safetensors but {description}")
        if len(start) < 10:
            raise self._error(f"has only {len(start)} bytes: it is truncated; download it again")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise self._error(
                f"claims a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read: not a safetensors file, "
                f"or a damaged one"
            )
        if 8 + length > self.nbytes:
            raise self._error(
                f"is truncated: its header alone has {length:,} bytes, the file {self.nbytes:,}; download it again"
            )
        if start[8:9] != b"{":
            raise self._error("is not a safetensors file: its header does not begin with '{'")
        file.seek(8)
        return file.read(length)

    def _parse(self, header: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        found = parse_object(header, f"the header of {quote(str(self.path))}")
        metadata = found.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("has __metadata__ that is not a map of text to text")
        if len(found) > MAX_TENSORS:
            raise self._error(f"holds {len(found):,} tensors; at most {MAX_TENSORS:,} are read")
        start = 8 + len(header)
        tensors = {name: self._info(name, entry, start) for name, entry in found.items()}
        place = start
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.begin != place:
                fault = "overlaps the tensor before it" if info.begin < place else "leaves a gap before it"
                raise self._error(f"is damaged: {quote(name)} {fault}")
            place = info.end
        if place > self.nbytes:
            raise self._error(
                f"is truncated: the header describes {place:,} bytes, the file has {self.nbytes:,}; download it again"
            )
        if place < self.nbytes:
            raise self._error(f"has {self.nbytes - place:,} bytes after its last tensor; download it again")
        return metadata, tensors

    def _info(self, name: str, entry: Any, start: int) -> TensorInfo:
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"has a header entry {quote(name)} that is not dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEMSIZE:
            raise self._error(f"stores {quote(name)} as {quote(dtype)}; supported are {', '.join(_ITEMSIZE)}")
        if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
            raise self._error(f"gives {quote(name)} the shape {quote(shape)}, which is not a list of sizes")
        if not _are_sizes(offsets) or len(offsets) != 2:
            raise self._error(f"gives {quote(name)} the data_offsets {quote(offsets)}, which are not two offsets")
        begin, end = offsets
        needed = math.prod(shape) * _ITEMSIZE[dtype]
        if end - begin != needed:
            raise self._error(
                f"gives {quote(name)} {quote(end - begin)} bytes, where {dtype} of shape {quote(shape)} "
                f"needs {quote(needed)}"
            )
        return TensorInfo(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)
