"""The hidden directory in which a checkpoint grows, and what an interrupted run leaves there for the next.

    .NAME.partial/ lock         who is writing (`lock.py`)
                   state.json   the last `commit`: what may be relied on. What it does not mention is swept away
                   data-N       the tensors of shard N, until it is full
                   shard-N      full shards
                   kept-N.TAG   arrays that a commit keeps for the next run
                   whole/       the finished checkpoint, on its way to NAME
                   replaced/    what was NAME before, until the new one is in its place

A commit is one rename, so that there is always exactly one state, and files that it no longer needs are removed only
after it. Everything is flushed to the disk before the name that makes it count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from tinychat.checkpoint.lock import Lock
from tinychat.checkpoint.quoting import quote
from tinychat.errors import CheckpointError

STATE = "state.json"
VERSION = 1


class Partial:
    """The directory `path` for what becomes `target`, locked. Its `state` is what an earlier run committed, or None.

    Whoever opens it continues or sweeps; see `CheckpointWriter`.
    """

    def __init__(self, target: Path):
        self.target = target
        self.path = target.with_name(f".{target.name}.partial")
        self._lock = Lock(self.path / "lock", quote(str(target)))
        try:
            self._restore_replaced()
            self.state = self._read_state()
        except BaseException:
            self.leave()
            raise

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def commit(self, state: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """From now on a run that opens this directory finds `state` and, by `kept`, these arrays."""
        serial = 1 if self.state is None else self.state["serial"] + 1
        for tag, array in arrays.items():
            with (self / f"kept-{serial}.{tag}").open("wb") as file:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                flush(file)
        kept = {tag: [array.dtype.str, array.shape] for tag, array in arrays.items()}
        committed = {**state, "version": VERSION, "serial": serial, "kept": kept}
        new = self / f"{STATE}.new"
        with new.open("w", encoding="utf-8") as text:
            json.dump(committed, text, ensure_ascii=False)
            flush(text)
        flush_directory(self.path)  # the names of the files that the state counts on
        new.replace(self / STATE)
        self.state = committed  # not before: what is told of it must be true on a full disk
        flush_directory(self.path)
        for path in self.path.glob("kept-*"):
            if not path.name.startswith(f"kept-{serial}."):
                path.unlink()

    def kept(self) -> dict[str, np.ndarray]:
        """The arrays of the last commit."""
        found = {}
        for tag, (dtype, shape) in (self.state or {"kept": {}})["kept"].items():
            path = self / f"kept-{(self.state or {})['serial']}.{tag}"
            try:
                found[tag] = np.fromfile(path, dtype).reshape(shape)
            except (OSError, ValueError):
                raise CheckpointError(f"{quote(str(path))} is missing or damaged; begin anew (--restart)") from None
        return found

    def sweep(self, counted: set[str]) -> None:
        """Remove all but the lock, the state, its arrays, the files `counted`, and what was NAME before."""
        if self.state is None:
            (self / STATE).unlink(missing_ok=True)
        else:
            counted = counted | {STATE} | {f"kept-{self.state['serial']}.{tag}" for tag in self.state["kept"]}
        for path in self.path.iterdir():
            if path.name not in counted | {"lock", "replaced"}:
                remove(path)

    def publish(self) -> None:
        """Rename whole/ to the target; what was there is put back if that fails, and removed otherwise."""
        whole, replaced = self / "whole", self / "replaced"
        flush_directory(whole)
        exchanged = self.target.exists() and any(self.target.iterdir())
        if exchanged:
            remove(replaced)  # of a run that was killed here, since when something else has become NAME
            self.target.rename(replaced)
        try:
            whole.rename(self.target)
        except OSError:
            if exchanged:
                replaced.rename(self.target)
            raise
        flush_directory(self.target.parent)

    def discard(self) -> None:
        """Remove everything, the state last: until then it says what is to be done with the rest."""
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == STATE):
            if path.name != "lock":
                remove(path)
        self._lock.release()

    def leave(self) -> None:
        """Keep what was committed for a later run, and what was NAME before."""
        if (self / STATE).exists() or (self / "replaced").exists():
            self._lock.leave()
        else:
            self.discard()

    def _restore_replaced(self) -> None:
        if not (self / "replaced").exists() or (self.target.exists() and not self.target.is_dir()):
            return
        if not self.target.exists() or not any(self.target.iterdir()):
            (self / "replaced").rename(self.target)  # over an empty directory too

    def _read_state(self) -> dict[str, Any] | None:
        if not (self / STATE).exists():
            return None
        try:
            state = json.loads((self / STATE).read_text(encoding="utf-8"))
            if state["version"] == VERSION:
                return dict(state)
        except (ValueError, KeyError, TypeError):
            pass
        raise CheckpointError(
            f"{quote(str(self / STATE))} is damaged, or of another version of tinychat; "
            f"remove {quote(str(self.path))} to begin anew"
        )


def remove(path: Path) -> None:
    """Remove a file or a directory, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_mount(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether something is mounted there, a part of the same file system too; such a directory cannot be renamed."""
    if os.path.ismount(path):
        return True
    try:
        table = mounts.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    places = (line.split(" ")[4] for line in table.split("\n") if line)
    return any(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place) == str(path) for place in places)


def flush(file: IO[Any]) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Make the names in a directory survive a loss of power; systems without the notion refuse to open one."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
