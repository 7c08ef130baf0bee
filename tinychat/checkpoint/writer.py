"""CheckpointWriter: a checkpoint directory written tensor by tensor, which appears whole or not at all.

Everything goes to a hidden directory beside the target, is flushed to the disk, and becomes visible by one rename.
The safetensors header stands before the data and needs all sizes, so a shard's data waits in a file of its own until
the shard is full; on the way behind its header it is sorted by item size, which keeps every tensor aligned.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from tinychat.checkpoint.layouts import Layout
from tinychat.checkpoint.quoting import listing, quote
from tinychat.checkpoint.safetensors_file import DTYPES
from tinychat.checkpoint.shards import INDEX, SINGLE
from tinychat.errors import CheckpointError

SHARD_BYTES = 2 << 30
_COPIED = (  # what belongs to a model besides its weights and its config.json
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "chat_template*.jinja",
    "chat_template*.json",
    "LICENSE*",
    "NOTICE*",
)
_WRITTEN = (*_COPIED, "config.json", SINGLE, INDEX, "model-*-of-*.safetensors")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_COPY_BYTES = 1 << 24


@dataclass
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # in the shard's data file
    nbytes: int
    itemsize: int


class CheckpointWriter:
    """Writes the checkpoint `directory`: `add` each tensor, then `finish`. A context manager that cleans up.

    directory    made by `finish`; one that holds files is refused, unless `overwrite` and only checkpoint files
    source       a checkpoint directory whose tokenizer, chat template, generation config and licence are copied
    shard_bytes  a new shard begins where this would be exceeded

    Every failure is a `CheckpointError` and leaves what was there before as it was.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        source: Path | str | None = None,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
    ):
        self.directory = Path(directory).resolve()
        self._source = None if source is None else Path(source)
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._shards: list[list[_Tensor]] = []
        self._names: set[str] = set()
        self._data: IO[bytes] | None = None
        self._data_bytes = 0
        self._partial: Path | None = None
        self._check_target()
        with self._faults("cannot be written"):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            partial = self.directory.with_name(f".{self.directory.name}.partial-{uuid.uuid4().hex[:8]}")
            partial.mkdir()
            self._partial = partial

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. `ValueError` for a second one of that name, or a dtype that the format lacks."""
        if array.dtype not in _NAMES:
            raise ValueError(f"{name} is {array.dtype}; safetensors holds {', '.join(DTYPES)}")
        if name in self._names:
            raise ValueError(f"{name} was added before")
        with self._faults("cannot be written"):
            if self._data is not None and self._data_bytes + array.nbytes > self._shard_bytes:
                self._close_shard(self._data)
            if self._data is None:
                self._data = (self._in_partial("data")).open("w+b")
                self._data_bytes = 0
                self._shards.append([])
            self._data.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._names.add(name)
        tensor = _Tensor(name, _NAMES[array.dtype], array.shape, self._data_bytes, array.nbytes, array.dtype.itemsize)
        self._shards[-1].append(tensor)
        self._data_bytes += array.nbytes

    def finish(self, config: dict[str, Any], quantization: Layout | None = None) -> Path:
        """Write `config` as config.json, with `quantization` in it, and make the directory visible; its path."""
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if quantization is not None:
            config["quantization_config"] = quantization.to_config()
        with self._faults("cannot be written"):
            if self._data is not None:
                self._close_shard(self._data)
            self._name_shards()
            if self._source is not None:
                self._copy_files(self._source)
            self._write_json("config.json", config)
            self._publish()
        return self.directory

    def abort(self) -> None:
        """Remove what was written so far; nothing has become visible. Does nothing after `finish`."""
        if self._data is not None:
            with suppress(OSError):  # what is still buffered may find the disk full once more
                self._data.close()
            self._data = None
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            self.abort()
            raise CheckpointError(
                f"{quote(str(self.directory))} {what}: {fault.strerror or fault}; nothing was changed there"
            ) from None

    def _in_partial(self, name: str) -> Path:
        if self._partial is None:
            raise ValueError("this writer has finished, or failed")
        return self._partial / name

    def _check_target(self) -> None:
        where = quote(str(self.directory))
        if self._source is not None and self._source.exists() and self._source.resolve() == self.directory.resolve():
            raise CheckpointError(f"{where} is the source itself; write to another directory")
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise CheckpointError(f"{where} is a file; give the directory to write")
        held = sorted(path.name for path in self.directory.iterdir())
        if held and not self._overwrite:
            raise CheckpointError(f"{where} exists and is not empty; choose another directory, or overwrite it")
        foreign = [name for name in held if not any(Path(name).match(pattern) for pattern in _WRITTEN)]
        if foreign:
            raise CheckpointError(
                f"{where} holds files that are not part of a checkpoint and would be lost: {listing(foreign)}; "
                f"choose another directory"
            )

    def _close_shard(self, data: IO[bytes]) -> None:
        """Put the header before the data of the current shard."""
        tensors = sorted(self._shards[-1], key=lambda tensor: (-tensor.itemsize, tensor.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for tensor in tensors:
            offsets = [place, place + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
            place += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data.flush()
        with self._in_partial(f"shard-{len(self._shards)}").open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                data.seek(tensor.begin)
                left = tensor.nbytes
                while left:
                    block = data.read(min(left, _COPY_BYTES))
                    if not block:
                        raise OSError("the data written before cannot be read back")
                    out.write(block)
                    left -= len(block)
            _flush(out)
        data.close()
        self._data = None
        self._in_partial("data").unlink()

    def _name_shards(self) -> None:
        n = len(self._shards)
        names = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            self._in_partial(f"shard-{i + 1}").rename(self._in_partial(name))
        if n > 1:
            weight_map = {
                tensor.name: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard
            }
            total = sum(tensor.nbytes for shard in self._shards for tensor in shard)
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def _copy_files(self, source: Path) -> None:
        for name in sorted({path.name for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
            with (source / name).open("rb") as original, self._in_partial(name).open("wb") as copy:
                shutil.copyfileobj(original, copy)
                _flush(copy)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with self._in_partial(name).open("wb") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
            _flush(file)

    def _publish(self) -> None:
        partial = self._in_partial("")
        _flush_directory(partial)
        self._check_target()  # once more: quantizing takes hours
        replaced: Path | None = None
        if self.directory.exists() and any(self.directory.iterdir()):
            replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
            self.directory.rename(replaced)
        try:
            partial.rename(self.directory)
        except OSError:
            if replaced is not None:
                replaced.rename(self.directory)
            raise
        self._partial = None
        _flush_directory(self.directory.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    """Make the names in a directory survive a loss of power; systems without the notion refuse to open one."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
