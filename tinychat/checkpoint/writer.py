"""CheckpointWriter: a checkpoint directory written tensor by tensor, which appears whole or not at all.

Everything goes to a hidden directory beside the target (`partial.py`), is flushed to the disk, and becomes visible by
one rename. The safetensors header stands before the data and needs all sizes, so a shard's data waits in a file of its
own until the shard is full; on the way behind its header it is sorted by item size, which keeps every tensor aligned.
The disk holds the checkpoint and one shard more.

Work that takes hours is told to `commit` from time to time: a run that is killed is then continued by the next.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from tinychat.checkpoint.layouts import WritableLayout
from tinychat.checkpoint.partial import Partial, flush, is_mount, remove
from tinychat.checkpoint.quoting import listing, quote
from tinychat.checkpoint.safetensors_file import DTYPES
from tinychat.checkpoint.shards import INDEX, SINGLE
from tinychat.errors import BackendError, CheckpointError, TinychatError

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
    run          what determines the bytes written, as plain values by name: makes `commit` possible, and this writer
                 go on where one with an equal `run` was stopped (`note` and `arrays` are then what that one committed)
    restart      throw away what an earlier run left
    way_out      what a user may do about a target that holds files, as ", or ..."

    Every failure is a `CheckpointError` and leaves what was there before as it was. What was committed is lost only by
    a `TinychatError` within the context that would come again: not by one of the disk, of what lies in the target, or
    of the device that computes (`BackendError`).
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        source: Path | str | None = None,
        shard_bytes: int = SHARD_BYTES,
        overwrite: bool = False,
        run: Mapping[str, Any] | None = None,
        restart: bool = False,
        way_out: str = "",
    ):
        self._way_out = way_out
        self.directory = Path(directory).resolve()
        self.note: dict[str, Any] | None = None
        self.arrays: dict[str, np.ndarray] = {}
        self.complete = False  # nothing is left to add: an earlier run had come to `finish`
        self._source = None if source is None else Path(source)
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._run = None if run is None else json.loads(json.dumps(run))
        self._shards: list[list[_Tensor]] = []
        self._names: set[str] = set()
        self._data: IO[bytes] | None = None
        self._data_bytes = 0
        self._published = False
        self._partial: Partial | None = None
        with self._faults("cannot be written"):
            self._refuse_target(within=False)
            self._partial = Partial(self.directory)
        try:
            with self._faults("cannot be written"):
                self._continue(self._partial, restart)
        except BaseException:
            if self._partial is not None:
                self._partial.leave()
            raise

    @property
    def kept_in(self) -> Path | None:
        """Where what was committed lies; None where nothing was."""
        return self._partial.path if self._partial is not None and self._partial.state is not None else None

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor. `ValueError` for a second one of that name, or a dtype that the format lacks."""
        self.add_parts(name, array.dtype, array.shape, (array,))

    def add_parts(self, name: str, dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> None:
        """The same of a tensor that comes in parts, one after the other along its first axis."""
        if dtype not in _NAMES:
            raise ValueError(f"{name} is {dtype}; safetensors holds {', '.join(DTYPES)}")
        if name in self._names:
            raise ValueError(f"{name} was added before")
        nbytes = math.prod(shape) * dtype.itemsize
        with self._faults("cannot be written"):
            if self._data is not None and self._data_bytes + nbytes > self._shard_bytes:
                self._close_shard(self._data)
            if self._data is None:
                self._data = (self._in_use() / f"data-{len(self._shards) + 1}").open("w+b")
                self._data_bytes = 0
                self._shards.append([])
            for part in parts:
                self._data.write(np.ascontiguousarray(part, dtype).reshape(-1).view(np.uint8).data)
        self._names.add(name)
        self._shards[-1].append(_Tensor(name, _NAMES[dtype], tuple(shape), self._data_bytes, nbytes, dtype.itemsize))
        self._data_bytes += nbytes

    def commit(self, note: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """What was added is kept through whatever happens, with `note` (as JSON) and `arrays` for who goes on."""
        with self._faults("cannot be written"):
            self._commit(note, arrays or {}, complete=False)

    def finish(self, config: dict[str, Any], quantization: WritableLayout | None = None) -> Path:
        """Write `config` as config.json, with `quantization` in it, and make the directory visible; its path."""
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        if quantization is not None:
            config["quantization_config"] = quantization.to_config()
        with self._faults("cannot be written"):
            partial = self._in_use()
            if not self._published:
                if self._data is not None:
                    self._close_shard(self._data)
                if self._run is not None and not self.complete:
                    self._commit(self.note or {}, {}, complete=True)
                remove(partial / "whole")
                (partial / "whole").mkdir()
                if self._source is not None:
                    self._copy_files(self._source)
                self._write_json("config.json", config)
                self._name_shards()
                try:
                    self._refuse_target(within=True)  # once more: quantizing takes hours
                except CheckpointError as fault:
                    kept = self._kept_words("clear the target, and the same again goes on from it")
                    self.suspend()
                    raise CheckpointError(f"{fault}{kept}") from None
                partial.publish()
            partial.discard()
            self._partial = None
        return self.directory

    def abort(self) -> None:
        """Remove what was written so far; nothing has become visible. Does nothing after `finish`."""
        self._close_data()
        if self._partial is not None:
            self._partial.discard()
            self._partial = None

    def suspend(self) -> None:
        """Keep what was committed for a later run, else remove everything. Does nothing after `finish`."""
        if self.kept_in is None:
            self.abort()
        elif self._partial is not None:
            self._close_data()
            self._partial.leave()
            self._partial = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, TinychatError) and not issubclass(kind, BackendError):
            self.abort()
        else:
            self.suspend()

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            kept = self._kept_words()
            self.suspend()
            raise CheckpointError(
                f"{quote(str(self.directory))} {what}: {fault.strerror or fault}; nothing was changed there{kept}"
            ) from None

    def _kept_words(self, advice: str = "the same again goes on from it") -> str:
        kept = self.kept_in
        return f"; what was finished is kept in {quote(str(kept))}: {advice}" if kept else ""

    def _in_use(self) -> Partial:
        if self._partial is None:
            raise ValueError("this writer has finished, or failed")
        return self._partial

    def _continue(self, partial: Partial, restart: bool) -> None:
        """Take up what an earlier run left, or clear the ground for a new one."""
        state = None if restart else partial.state
        if state is not None and state["run"] != self._run:
            raise CheckpointError(_different(partial, state["run"], self._run or {}))
        self.complete = state is not None and state["complete"]
        self._published = self.complete and self._published_by(partial)
        if not self._published:
            self._refuse_target(within=True)
        if state is None:
            partial.state = None
            partial.sweep(set())
            return
        self.note = state["note"]
        self._shards = [[_Tensor(*tensor) for tensor in shard] for shard in state["shards"]]
        self._names = {tensor.name for shard in self._shards for tensor in shard}
        if self._published:
            return
        for path in (partial / "whole").glob("*.safetensors"):
            number = re.fullmatch(r"model-(\d+)-of-\d+", path.stem)
            path.rename(partial / f"shard-{int(number[1]) if number else 1}")
        n_closed, data_bytes = state["closed"], state["data_bytes"]
        counted = {f"shard-{i + 1}" for i in range(n_closed)}
        if n_closed < len(self._shards):
            counted.add(f"data-{n_closed + 1}")
        missing = sorted(name for name in counted if not (partial / name).exists())
        if not missing and n_closed < len(self._shards):
            self._data = (partial / f"data-{n_closed + 1}").open("r+b")
            self._data_bytes = self._data.seek(0, 2)
            if self._data_bytes < data_bytes:
                missing = [f"the end of data-{n_closed + 1}"]
            self._data_bytes = self._data.truncate(data_bytes)
            self._data.seek(data_bytes)
        if missing:
            raise CheckpointError(
                f"{quote(str(partial.path))} lacks {listing(missing)} of the run that it is to continue; begin anew "
                f"(--restart)"
            )
        self.arrays = partial.kept()
        partial.sweep(counted)

    def _published_by(self, partial: Partial) -> bool:
        """Whether a run of complete state was killed when the checkpoint was in its place already."""
        weights = [*partial.path.glob("shard-*"), *partial.path.glob("whole/*.safetensors")]
        return not weights and self.directory.exists()

    def _commit(self, note: Mapping[str, Any], arrays: Mapping[str, np.ndarray], *, complete: bool) -> None:
        partial = self._in_use()
        if self._run is None:
            raise ValueError("this writer was not told what run it is of")
        if self._data is not None:
            flush(self._data)
        n_closed = len(self._shards) - (self._data is not None)
        state = {
            "run": self._run,
            "note": note,
            "complete": complete,
            "closed": n_closed,
            "data_bytes": self._data_bytes if self._data is not None else 0,
            "shards": [[astuple(tensor) for tensor in shard] for shard in self._shards],
        }
        partial.commit(state, arrays)
        self.note = dict(note)
        for number in range(1, n_closed + 1):
            (partial / f"data-{number}").unlink(missing_ok=True)

    def _refuse_target(self, *, within: bool) -> None:
        """`CheckpointError` where the target cannot be written; `within`: neither what it holds replaced."""
        where = quote(str(self.directory))
        if self._source is not None and self._source.exists() and self._source.resolve() == self.directory:
            raise CheckpointError(f"{where} is the source itself; write to another directory")
        if not self.directory.exists():
            return
        if not self.directory.is_dir():
            raise CheckpointError(f"{where} is a file; give the directory to write")
        if is_mount(self.directory):
            raise CheckpointError(
                f"{where} is a mount point, and a checkpoint appears by renaming its directory; give a directory in it"
            )
        held = sorted(path.name for path in self.directory.iterdir()) if within else []
        if held and not self._overwrite:
            raise CheckpointError(f"{where} exists and is not empty; choose another directory{self._way_out}")
        foreign = [name for name in held if not any(Path(name).match(pattern) for pattern in _WRITTEN)]
        if foreign:
            raise CheckpointError(
                f"{where} holds files that are not part of a checkpoint and would be lost: {listing(foreign)}; "
                f"choose another directory"
            )

    def _close_data(self) -> None:
        if self._data is not None:
            with suppress(OSError):  # what is still buffered may find the disk full once more
                self._data.close()
            self._data = None

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
        number, partial = len(self._shards), self._in_use()
        with (partial / f"shard-{number}").open("wb") as out:
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
            flush(out)
        data.close()
        self._data = None
        if self._run is None:
            (partial / f"data-{number}").unlink()  # else by the commit that no longer needs it

    def _name_shards(self) -> None:
        n = len(self._shards)
        names = [SINGLE] if n == 1 else [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            (self._in_use() / f"shard-{i + 1}").rename(self._in_use() / "whole" / name)
        if n > 1:
            weight_map = {
                tensor.name: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard
            }
            total = sum(tensor.nbytes for shard in self._shards for tensor in shard)
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def _copy_files(self, source: Path) -> None:
        for name in sorted({path.name for pattern in _COPIED for path in source.glob(pattern) if path.is_file()}):
            with (source / name).open("rb") as original, (self._in_use() / "whole" / name).open("wb") as copy:
                shutil.copyfileobj(original, copy)
                flush(copy)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with (self._in_use() / "whole" / name).open("wb") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
            flush(file)


def _different(partial: Partial, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Why a run cannot go on with what another left."""
    before = before or {}
    changes = [
        f"{name} was {quote(before.get(name))}, now {quote(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return (
        f"{quote(str(partial.path))} holds an unfinished run that differs from this one: {'; '.join(changes)}. "
        f"Repeat that one to finish it, or begin anew (--restart), which throws away what it had done"
    )
