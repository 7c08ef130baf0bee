"""A lock file: one process at a time, and the pid and time of who has it for the others to read.

The system takes the lock back when its process ends, however it ends; a file that a killed process left locks nothing.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tinychat.checkpoint.quoting import quote
from tinychat.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lock:
    """Held from its making until `release`. `CheckpointError`, naming the holder, where another process has it.

    path  the lock file, in a directory that is made where it is missing
    what  is locked, for the message
    """

    def __init__(self, path: Path, what: str):
        self._path = path
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # who had it removed the directory just now
                continue
            if not self._taken():
                who = _read(self._handle)
                os.close(self._handle)
                raise CheckpointError(
                    f"{what} is being written by another process{who}; wait until it is done, or end it"
                )
            if _is(self._handle, path):
                break
            os.close(self._handle)
        holder = {"pid": os.getpid(), "since": datetime.now().isoformat(" ", "seconds")}
        try:
            os.ftruncate(self._handle, 0)
            os.write(self._handle, json.dumps(holder).encode())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let others have the lock; the file goes, and its directory if nothing else is there."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)
        with suppress(OSError):  # not empty: kept files, or those of a process that has the lock by now
            self._path.parent.rmdir()

    def leave(self) -> None:
        """Let others have the lock; the file stays."""
        os.close(self._handle)

    def _taken(self) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as fault:
            warnings.warn(
                f"{quote(str(self._path))} cannot be locked ({fault.strerror}): see to it yourself that nothing else "
                f"writes there",
                stacklevel=2,
            )
        return True


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        return f" (pid {int(found['pid'])}, since {found['since']!s:.40})"
    except (OSError, ValueError, KeyError, TypeError):  # it is writing this very moment
        return ""
